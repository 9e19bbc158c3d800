"""Options that all benchmarks have: what cannot be is refused before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from script_module import module_of

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = ("assignment", "expert_parallel", "finetune_folder", "generate", "gpu", "layer", "train_step")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--rounds", "0", "must be 1 or more: got 0"),
        ("--rounds", "-3", "must be 1 or more: got -3"),
        ("--rounds", "two", "must be a whole number: got 'two'"),
        ("--json", "{}/nowhere/found.json", "must name a file in a folder that is there: got '{}/nowhere/found.json'"),
        ("--json", "{}", "must name a file in a folder that is there: got '{}'"),
    ],
)
def test_what_cannot_be_is_refused(
    option: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with module_of(FOLDER / "interleaved.py") as script:
        parser = argparse.ArgumentParser()
        parser.add_argument("--rounds", type=script.counted)
        parser.add_argument("--json", type=script.written)
        given = parser.parse_args(["--rounds", "2", "--json", str(tmp_path / "found.json")])
        assert (given.rounds, given.json) == (2, tmp_path / "found.json")
        with pytest.raises(SystemExit):
            parser.parse_args([option, value.format(tmp_path)])
    assert f"argument {option}: {said.format(tmp_path)}" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_asks_so(name: str) -> None:
    """By its text: the programs import transformers and take seconds to say no."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert '"--rounds", type=counted' in text
    assert ('"--out", type=written' if name == "assignment" else '"--json", type=written') in text
