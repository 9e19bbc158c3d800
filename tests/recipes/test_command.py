"""The command line that recipes share: help, variants, YAML, and errors with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekit.recipes import zcode_m3
from moekit.recipes._command import as_plain, build_parser, from_plain, main


def run(*arguments: str) -> int:
    return main(zcode_m3.RECIPE, arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runn"], ["unknown command", "run"]),
        (["run", "--variant", "tinny"], ["unknown variant", "Did you mean tiny"]),
        (["--data.sourc", "babel"], ["unknown option --data.sourc", "Did you mean --data.source"]),
        (["--tasks.translation.tokns=5"], ["Did you mean --tasks.translation.tokens"]),
        (["--train.max_steps", "many"], ["train.max_steps", "many"]),
        (["--train.schedule", "linear"], ["train.schedule", "cosine"]),
        (["run", "extra"], ["unexpected argument 'extra'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--variant"], ["--variant needs a value"]),
    ],
)
def test_mistakes_are_explained(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message


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
        *zcode_m3.VARIANTS,
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


@pytest.mark.parametrize("variant", zcode_m3.VARIANTS)
def test_printed_configuration_is_the_variant(variant: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What --print_config prints, given back with --config, is the variant again."""
    with pytest.raises(SystemExit):
        run("--variant", variant, "--print_config")
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    parsed = build_parser(zcode_m3.RECIPE, "run", variant).parse_args(["--config", str(file)])
    config = as_plain(zcode_m3.VARIANTS[variant])
    assert as_plain(from_plain(zcode_m3.Config, parsed, "printed")) == config


def test_settings_that_came_later_have_their_default() -> None:
    """A run folder of an older version can still be tested."""
    values = as_plain(zcode_m3.VARIANTS["tiny"])
    del values["strategy"], values["train"]["num_nodes"]
    assert from_plain(zcode_m3.Config, values, "old run") == zcode_m3.VARIANTS["tiny"]


@pytest.mark.parametrize(
    "arguments", [["--devices", "3", "--nodes=2"], ["--train.devices=3", "--train.num_nodes", "2"]]
)
def test_short_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*arguments, "--print_config")
    printed = capsys.readouterr().out
    assert "devices: 3" in printed
    assert "num_nodes: 2" in printed
