"""`--smoke`: every stage of a run in seconds; and what is chosen, and said, where the user left something open."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException

from moekit.cli import run_all
from moekit.cli.program import main
from moekit.cli.recipes import main as recipe_main
from moekit.errors import UserError
from moekit.report import results_markdown, write_comparison
from moekit.runs import Run, fit
from moekit.runs.known import recipe_names
from moekit.runs.plain import as_plain
from moekit.runs.recipe import Recipe, find_recipe
from moekit.runs.smoke import WARNING, smoke

FAST = "shazeer"  # an LSTM: the cheapest of all
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in recipe_names() if name != FAST]
NO_RESULTS = "its numbers are no results"


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    return found


@pytest.mark.parametrize("name", [FAST, *SLOW])
def test_every_stage_takes_place_and_is_labelled(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a[/b]\x1b[2J"  # the recorded folder is hostile, and each output shows it
    options = ["--data.cache", str(tmp_path / "cache"), "--train.accelerator", "cpu"]
    assert main(["run", name, "--smoke", *options, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert WARNING in said.out
    assert "This was a smoke test" in said.out, "the summary of the end says it too"
    assert r"a[/b]\x1b[2J" in said.out
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert settings(out)["smoke"] is True
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert (summary["smoke"], summary["steps"]) == (True, 6)
    assert len((out / "metrics.csv").read_text("utf-8").splitlines()) > 3
    assert summary["test"] or summary["bleu"] or summary["scores"], "it was tested"
    assert (out / "samples.json").exists()
    assert NO_RESULTS in (out / "report.html").read_text("utf-8")
    assert "smoke test" in results_markdown(out).splitlines()[0]
    page = write_comparison([out, out], tmp_path / "both.html")
    assert NO_RESULTS in page.read_text("utf-8")


@pytest.mark.parametrize("name", recipe_names())
def test_it_is_small_in_every_variant(name: str) -> None:
    recipe = find_recipe(name, "")
    for variant in recipe.variants.values():
        config = smoke(variant.config)
        assert (config.train.max_steps, config.train.precision) == (6, "auto")
        assert config.train.warmup_steps < 6
        assert config.model.dim <= 32
        assert config.model.num_experts <= 8
        assert (config.model.num_experts == 0) == (variant.config.model.num_experts == 0), "dense stays dense"
        assert config.train.optimizer == variant.config.train.optimizer
        assert config.data.source == variant.config.data.source
        assert config.evaluate.max_sentences == 2
        assert config.data.babel_sentences * config.data.babel_languages >= 800


def lines_by_recipe(said: str) -> dict[str, str]:
    """What `run all` says of each recipe."""
    return {line.split()[0]: line for line in said.splitlines() if re.match(r"\w+ +(passed|failed) ", line)}


@pytest.mark.slow
def test_all_recipes_in_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "all", "--smoke", "--train.accelerator", "cpu"]) == 0
    said = capsys.readouterr()
    assert WARNING in said.out
    assert [*lines_by_recipe(said.out)] == recipe_names()
    for line in lines_by_recipe(said.out).values():
        assert re.search(r" passed  trained, validated, tested, reported +\d+\.\d s$", line)
    assert f"all {len(recipe_names())} passed" in said.out
    assert not said.err
    assert not list(tmp_path.iterdir()), "runs and cache lie elsewhere, and are gone"


def test_a_recipe_that_fails_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is refused, one stops at an error that is not the user's, and the last one passes."""
    names, train = ["gshard", "switch", FAST], fit.fit

    def broken(recipe: Recipe, *given: Any, **more: Any) -> Run:
        if recipe.name == "gshard":
            raise UserError("not\x1b[2J today")
        if recipe.name == "switch":
            raise ZeroDivisionError("of this test")
        return train(recipe, *given, **more)

    monkeypatch.setattr(run_all, "recipe_names", lambda: names)
    monkeypatch.setattr(fit, "fit", broken)
    options = ["--train.accelerator", "cpu", "--data.cache", str(tmp_path / "cache")]
    assert main(["run", "all", "--smoke", *options, "--out", str(tmp_path / "kept")]) == 1
    said = capsys.readouterr()
    found = lines_by_recipe(said.out)
    assert [*found] == names
    assert re.search(r"failed  nothing done .* error: not\\x1b\[2J today$", found["gshard"])
    assert found["switch"].endswith("ZeroDivisionError: of this test")
    assert "passed  trained, validated, tested, reported" in found[FAST]
    assert "2 of 3 failed: gshard, switch" in said.out
    assert said.err.count("Traceback") == 1, "of the error that is not the user's"
    assert settings(tmp_path / "kept" / FAST)["smoke"] is True


@pytest.mark.parametrize("number", [1, 143])
def test_a_signal_ends_all_recipes(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*given: Any, **more: Any) -> Run:
        raise SIGTERMException(number)

    monkeypatch.setattr(fit, "fit", ended)
    with pytest.raises(SIGTERMException) as end:
        main(["run", "all", "--smoke", "--out", str(tmp_path / "kept"), "--data.cache", str(tmp_path)])
    assert end.value.code == number


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "run all needs --smoke: "),
        (["--smoke", "--variant", "tiny"], "run all takes no --variant"),
        (["--smoke", "--devices=2"], "run all takes no --devices: all recipes share this one process"),
        (["--smoke", "--out"], "--out needs a value"),
        (["--smoke", "--out", __file__], "--out must be a folder"),
        (["--smoke", "--lerning_rate", "1"], "unknown option --lerning_rate. Did you mean --train.learning_rate?"),
    ],
)
def test_what_all_recipes_cannot_do(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "all", *given]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_two_languages_have_text_enough_for_the_vocabulary(tmp_path: Path) -> None:
    options = ["--data.cache", str(tmp_path / "cache"), "--train.accelerator", "cpu", "--out", str(tmp_path / "run")]
    assert main(["fit", "moe_lm", "--variant", "facts_dense", "--smoke", *options]) == 0
    assert settings(tmp_path / "run")["data"]["babel_languages"] == 2


def test_settings_of_the_user_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "en.txt").write_text("".join(f"line {i} of a text of {i % 7} words\n" for i in range(400)), "utf-8")
    given = [
        "--data.source", "text", "--data.path", str(text), "--data.vocab_size", "340", "--train.max_steps", "2",
        "--model.hidden_dim", "24", "--data.cache", str(tmp_path / "cache"), "--train.accelerator", "cpu",
    ]  # fmt: skip
    out = tmp_path / "run"
    assert recipe_main(find_recipe("moe_lm", ""), ["fit", "--smoke", *given, "--out", str(out)]) == 0
    config = settings(out)
    assert (config["data"]["source"], config["data"]["vocab_size"]) == ("text", 340)
    assert (config["train"]["max_steps"], config["model"]["hidden_dim"], config["model"]["dim"]) == (2, 24, 32)
    assert config["train"]["warmup_steps"] == 0
    said = capsys.readouterr().out
    assert "train.warmup_steps is 0 of the 2 steps of training, not 2" in said
    assert WARNING in said

    # A run that goes on keeps what it began with, whatever the defaults are.
    again = ["fit", "--smoke", *given, "--out", str(out), "--resume", "--train.max_steps", "4"]
    assert recipe_main(find_recipe("moe_lm", ""), again) == 0
    assert (settings(out)["train"]["max_steps"], settings(out)["train"]["warmup_steps"]) == (4, 0)
    said = capsys.readouterr().out
    assert "train.warmup_steps is 0 as the run began, not 2" in said
    assert "begins anew" not in said
    again += ["--train.warmup_steps", "1"]
    assert recipe_main(find_recipe("moe_lm", ""), again) == 2
    assert re.search(r"train.warmup_steps \(0 there, 1 now\)", capsys.readouterr().err)


@pytest.mark.parametrize("how", ["options", "file"])
def test_a_warmup_that_takes_all_steps_is_refused_where_it_was_given(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--train.max_steps", "20", "--train.warmup_steps=20"]
    if how == "file":
        (tmp_path / "a.yaml").write_text("train: {warmup_steps: 200}\n")
        given = ["--config", str(tmp_path / "a.yaml"), "--train.max_steps", "20"]
    out = tmp_path / "run"
    assert main(["run", "gshard", *given, "--out", str(out), "--data.cache", str(tmp_path / "cache")]) == 2
    message = capsys.readouterr().err
    assert re.search(r"train.warmup_steps must be less than train.max_steps: got 20?0 of 20", message)
    assert not out.exists()
    assert not (tmp_path / "cache").exists()


def test_resume_without_a_run_begins_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is queued again has --resume from the first time on (docs/guides/cluster.md)."""
    out = tmp_path / "run"

    monkeypatch.setattr("moekit.runs.fit.fit", lambda *given, **options: Run(out))
    assert main(["fit", "gshard", "--resume", "--out", str(out)]) == 0
    assert f"{out}: no run is there; it begins anew." in capsys.readouterr().out
    assert main(["fit", "gshard", "--out", str(out)]) == 0
    assert "begins anew" not in capsys.readouterr().out
    config = {"recipe": "gshard", "variant": "tiny", **as_plain(find_recipe("gshard", "").default)}
    Run.create(out, config)
    assert main(["fit", "gshard", "--resume", "--out", str(out)]) == 0
    assert f"{out}: the run has no checkpoint yet; it begins anew." in capsys.readouterr().out
