"""What a program does before it begins: help texts load little, and bad settings are refused before text is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moekit.cli.recipes import main
from moekit.recipes import switch
from moekit.runs.config import RunConfig

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
