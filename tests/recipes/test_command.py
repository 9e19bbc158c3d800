"""The command line that recipes share: help, variants, YAML, and errors with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekit.cli.recipes import build_parser, main, reconfigured
from moekit.errors import UserError
from moekit.recipes import zcode_m3
from moekit.runs.plain import as_plain


def run(*arguments: str) -> int:
    return main(zcode_m3.RECIPE, arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runn"], ["unknown command", "run"]),
        (["run", "--variant", "tinny"], ["unknown variant", "Did you mean 'tiny'"]),
        (["--data.sourc", "babel"], ["unknown option --data.sourc", "Did you mean --data.source"]),
        (["--tasks.translation.tokns=5"], ["Did you mean --tasks.translation.tokens"]),
        (["--train.max_steps", "many"], ["train.max_steps must be a whole number: got 'many'"]),
        (
            ["--train.schedule", "linear"],
            ["train.schedule must be one of cosine, inverse_square_root, constant: got 'linear'"],
        ),
        (
            ["--data.mask_shares", "0.8,0.1,0.1"],
            ["data.mask_shares must be a list in brackets, such as [0.8,0.1,0.1]: got"],
        ),
        (["--train.warmup_steps", "30", "--train.max_steps", "30"], ["train.warmup_steps", "30 of 30"]),
        (["--data.source", "moses"], ["data.path must give one folder for"]),
        (["--data.source", "moses,jsonl"], ["data.path must give 2 folders, joined by commas, for"]),
        (["run", "extra"], ["unexpected argument 'extra'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--variant"], ["--variant needs a value"]),
        (["--data.path", "--overwrite"], ["--data.path needs a value: text"]),
        (["--data.num_workers", "few"], ["data.num_workers must be a whole number or auto: got 'few'"]),
        (["--data.babel_sizes.kmb", "few"], ["data.babel_sizes", "few"]),
        (["--tasks.denoising.weight=!!int"], ["tasks.denoising.weight must be a number: got '!!int'"]),
        (["--train.max_steps", "!!bool x"], ["train.max_steps must be a whole number: got '!!bool x'"]),
        (["--data.cache", "!!timestamp x"], ["data.cache must be text: got '!!timestamp x'"]),
        (["--data.babel_sizes.kmb=!!int"], ["data.babel_sizes must be a mapping", "got kmb: '!!int'"]),
        (["--out", ""], ["out must be the name of a file or a folder: got ''"]),
        (["--config="], ["--config needs a value"]),
        (["finetune", "--init_from", ""], ["--init_from needs a value"]),
        (["--out", "runs/\udc80"], [r"the run folder runs/\udc80 must have a path in UTF-8"]),
        (["plan", "--resume"], ["--resume is an option of run, fit, finetune, distill, not of this command"]),
        (["plan", "--out=runs/x"], ["--out is an option of run"]),
        (["run", "--fine_tune.rank", "4"], ["unknown option --fine_tune.rank"]),
        (["run", "--memory", "4"], ["--memory is an option of plan, not of this command"]),
        (["--recipe", "switch"], ["recipe must be zcode_m3: got 'switch'"]),
    ],
)
def test_mistakes_are_explained(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.num_workers", "-1"),
        ("data.seed", "-1"),
        ("data.temperature", "0"),
        ("train.max_steps", "-3"),
        ("train.max_minutes", ".nan"),
        ("train.learning_rate", "-1"),
        ("train.warmup_steps", "-1"),
        ("train.clip", "-1"),
        ("train.accumulate", "0"),
        ("train.log_every", "0"),
        ("train.validate_every", "-1"),
        ("train.checkpoint_steps", "-1"),
        ("train.expert_lr_multiplier", "0"),
        ("train.label_smoothing", "1"),
        ("train.betas", "[0.9,1.5]"),
        ("train.devices", "0"),
        ("model.dropout", "2"),
        ("model.encoder_layers", "0"),
        ("model.heads", "0"),
        ("model.capacity_factor", "-1"),
        ("model.load_balance", ".nan"),
        ("model.hidden_dim", "100000000000000000000"),
        ("data.mask_shares", "[0.8,0.1,1e30]"),
        ("strategy.expert_parallel_size", "0"),
        ("model.num_experts", "-1"),
        ("tasks.translation.tokens", "-1"),
        ("tasks.denoising.weight", "-1"),
        ("evaluate.beam_size", "0"),
        ("evaluate.max_sentences", "-1"),
        ("evaluate.batch_tokens", "0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_key(
    key: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is made: a beam of no sentences would be found out after training."""
    assert run(f"--{key}={value}", "--out", str(tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in (f"error: {key} must be", "got")), message
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=key):  # as operations on trained models change settings
        reconfigured(zcode_m3.RECIPE, zcode_m3.RECIPE.variants["tiny"].config, [f"--{key}={value}"])


@pytest.mark.parametrize(("arguments", "words"), [(["--model.heads", "3"], "dim must be divisible by heads")])
def test_a_model_that_cannot_be_built_leaves_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.babel_sentences", "60", "--data.vocab_size", "512", "--data.cache", str(tmp_path / "cache")]
    assert run(*arguments, *data, "--out", str(tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("a model cannot be built with these settings", words)), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data:\n  sorce: babel\n", ["data.sorce", "data.source"]),
        ("trian:\n  max_steps: 3\n", ["trian"]),
        ("train:\n  max_steps: [\n", ["bad.yaml"]),
    ],
)
def test_mistakes_in_yaml(text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert run("--config", str(file)) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_help_speaks_to_a_newcomer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run("--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    for name in (
        *zcode_m3.RECIPE.variants,
        "run",
        "fit",
        "test",
        "generate",
        "score",
        "--resume",
        "--data.source",
        "--train.max_minutes",
    ):
        assert name in text
    assert "\b" not in text


@pytest.mark.parametrize("variant", zcode_m3.RECIPE.variants)
def test_printed_configuration_is_the_variant(variant: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What --print_config prints, given back with --config, is the variant again."""
    with pytest.raises(SystemExit):
        run("--variant", variant, "--print_config")
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    parsed = build_parser(zcode_m3.RECIPE, "run", variant).parse_args(["--config", str(file)])
    config = as_plain(zcode_m3.RECIPE.variants[variant].config)
    assert as_plain(zcode_m3.RECIPE.config(parsed, "printed")) == config


@pytest.mark.parametrize("maker", ["run", "fit", "finetune", "distill", "plan"])
def test_printed_configuration_is_read_by_every_command(
    maker: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Options of the command that printed it are no settings of another: they are left alone."""
    with pytest.raises(SystemExit):
        run(maker, "--variant", "small", "--model.dim", "48", "--print_config")
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    for reader in ("run", "fit", "finetune", "distill", "plan"):
        with pytest.raises(SystemExit) as end:
            run(reader, "--config", str(file), "--print_config")
        assert end.value.code in (0, None)
        again = capsys.readouterr().out
        assert "variant: small" in again
        assert "dim: 48" in again
        assert ("\nout:" in again) == (reader != "plan")
        assert ("\nsequences:" in again) == (reader == "plan")


def test_mistakes_in_a_configuration_are_explained_where_one_is_to_be_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("variant: tiny\ntrain:\n  max_step: 3\n")
    assert run("--config", str(file), "--print_config") == 2
    assert "unknown key train.max_step in the configuration. Did you mean train.max_steps?" in capsys.readouterr().err
    file.write_text("colour: green\n")
    assert run("--config", str(file)) == 2
    message = capsys.readouterr().err
    assert "unknown key colour" in message
    assert "--help lists them" in message
    assert len(message) < 300


def test_settings_that_came_later_have_their_default() -> None:
    """A run folder of an older version can still be tested."""
    values = as_plain(zcode_m3.RECIPE.variants["tiny"].config)
    del values["strategy"], values["train"]["num_nodes"]
    assert zcode_m3.RECIPE.config(values, "old run") == zcode_m3.RECIPE.variants["tiny"].config


@pytest.mark.parametrize(
    "arguments", [["--devices", "3", "--nodes=2"], ["--train.devices=3", "--train.num_nodes", "2"]]
)
def test_short_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*arguments, "--print_config")
    printed = capsys.readouterr().out
    assert "devices: 3" in printed
    assert "num_nodes: 2" in printed
