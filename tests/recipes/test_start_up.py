"""What a program does before it begins: help texts load little, and bad settings are refused before text is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moekit.cli.recipes import main
from moekit.recipes import switch
from moekit.runs.config import RunConfig
from moekit.runs.known import recipe_about, recipe_names
from moekit.runs.recipe import find_recipe

# Drawing, scoring, exchange and compilers. Lightning's own metrics load some of them where they are installed, so what
# Lightning has loaded before does not count.
_NOT_FOR_HELP = (
    "matplotlib",
    "PIL",
    "sacrebleu",
    "transformers",
    "scipy",
    "numba",
    "triton",
    "onnxscript",
    "tensorboard",
)
_PROGRAM = f"""
import contextlib, io, sys
import lightning.pytorch, jsonargparse
before = set(sys.modules)
from moekit.cli import recipes
from moekit.cli.program import main
from moekit.recipes.switch import RECIPE
codes = []
with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()) as mistakes:
    for words in ("--help", "run --help", "report --help", "curve --help", "run switch --no"):
        try:
            codes.append(main(words.split()))
        except SystemExit as end:
            codes.append(end.code)
    with contextlib.suppress(SystemExit):
        recipes.main(RECIPE, ["run", "--help"])
assert codes == [0, 0, 0, 0, 2], codes
assert "commands on recipes" in text.getvalue() and "--train.warmup_steps" in text.getvalue()
assert "unknown option --no" in mistakes.getvalue()
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({_NOT_FOR_HELP!r})))
"""


_LISTS = """
import contextlib, io, sys
from moekit.cli.program import main
asked = {
    "--help": 0, "run --help": 0, "generate --help": 0, "run all --help": 0, "prune --help": 0, "curve --help": 0,
    "inspect --help": 0, "report --help": 0, "ablate --help": 0, "prunee": 2, "run swich": 2, "run": 2, "run all": 2,
    "prune --kep 2": 2, "compare --help": 0, "compare --no-such 1": 2, "report --no-such 1": 2, "ablate --no-such 1": 2,
}
for words, expected in asked.items():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(words.split())
        except SystemExit as end:
            code = end.code
    assert code == expected, (words, code)
    print(words, *sorted({name.partition(".")[0] for name in sys.modules} & {names!r}), sep=": ")
"""
_HEAVY = {"torch", "lightning", "torchmetrics", "transformers", "matplotlib", "scipy", "sacrebleu", "sentencepiece"}


def test_lists_and_wrong_names_load_neither_torch_nor_lightning() -> None:
    """Help of the program and of commands, and commands, recipes and options of commands that are refused."""
    program = _LISTS.replace("{names!r}", repr(_HEAVY))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 10
    assert not [line for line in lines if ": " in line]


def test_what_is_said_of_a_recipe_is_what_it_says() -> None:
    for name in recipe_names():
        assert recipe_about(name) == find_recipe(name, "").about


_NAMES = """
import sys
assert "moekit.training.strategy" not in sys.modules
trainer = L.Trainer(strategy="expert_parallel_zero2", devices=1, accelerator="cpu", logger=False,
                    enable_checkpointing=False)
assert type(trainer.strategy) is moekit.ExpertParallelStrategy
assert trainer.strategy.zero_stage == 2
assert not [finder for finder in sys.meta_path if "moekit" in type(finder).__module__]
import moekit.runs, moekit.runs.settings
for package in (moekit, moekit.runs, moekit.runs.settings):
    assert not [name for name in package.__all__ if getattr(package, name) is None]
assert {*moekit.__all__} <= {*dir(moekit)}
assert moekit.surgery.__name__ == "moekit.surgery"
assert not hasattr(moekit, "nothing") and not hasattr(moekit, "_nothing")
"""


@pytest.mark.parametrize("order", ["import moekit, lightning as L", "import lightning.pytorch as L, moekit"])
def test_names_are_known_whichever_is_imported_first(order: str) -> None:
    """Those of the strategy to Lightning, and those of moekit, which are imported when they are used."""
    program = order + _NAMES
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_help_and_refusals_load_neither_plotting_nor_scoring() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train.warmup_steps", "100", "--train.max_steps", "100"], "train.warmup_steps must be less than"),
        (["--train.clip_update", "2"], "train.clip_update=2.0 is of adafactor"),
        (["--model.heads", "3"], "dim must be divisible by heads"),
        (["--model.k", "99"], "99"),
        (["--train.max_steps", "0", "--train.max_minutes", "0"], "training needs an end"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_settings_are_refused_before_text_is_read(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("text was read")

    monkeypatch.setattr(RunConfig, "batches", read)
    assert main(switch.RECIPE, ["run", "--out", str(tmp_path / "run"), *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
