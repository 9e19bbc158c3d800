"""`plan`: every recipe's default and published models on a layout, without running anything."""

from __future__ import annotations

import pytest

from moekit.cli.recipes import main
from moekit.recipes import hash_layers, moe_lm, shazeer, zcode_m3
from moekit.runs import Recipe


def run(recipe: Recipe, *arguments: str) -> int:
    return main(recipe, ["plan", *arguments])


def test_a_published_model_on_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--devices", "8", "--nodes", "8", "--strategy.expert_parallel_size", "64"]
    assert run(zcode_m3.RECIPE, "--variant", "paper", *layout, "--memory", "40", "--length", "256") == 0
    shown = capsys.readouterr().out
    for words in ("64 devices, expert 64, ZeRO 3", "10.3 B", "fits into 40 GiB", "fewest devices of 40 GiB"):
        assert words in shown
    paper = ["--variant", "paper_207b", "--devices", "4", "--length", "64"]
    for memory, answer in (("40", "fewest devices of 40 GiB: 128 devices, expert 128"), ("1", "fits on no number of")):
        assert run(moe_lm.RECIPE, *paper, "--memory", memory) == 0
        shown = capsys.readouterr().out
        assert f"does not fit into {memory} GiB" in shown
        assert answer in shown


def test_without_a_strategy_every_device_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(hash_layers.RECIPE, "--devices", "2") == 0
    shown = capsys.readouterr().out
    assert "2 devices, ZeRO 0" in shown
    assert "tiny" in shown


@pytest.mark.parametrize(
    ("recipe", "arguments", "words"),
    [
        (zcode_m3.RECIPE, ["--devices", "3", "--strategy.expert_parallel_size", "2"], "must divide the number"),
        (zcode_m3.RECIPE, ["--devices", "6", "--strategy.expert_parallel_size", "6"], "experts"),
        (zcode_m3.RECIPE, ["--strategy.expert_parallel_size", "auto"], "plan needs a number"),
        (zcode_m3.RECIPE, ["--sequences", "0"], "sequences must be a whole number, 1 or more: got '0'"),
        (shazeer.RECIPE, [], "transformer"),
    ],
)
def test_mistakes(
    recipe: Recipe,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(recipe, *arguments) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
