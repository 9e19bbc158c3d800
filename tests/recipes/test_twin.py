"""`moekit run --twin`: the variant and its dense twin by one command, paired, and a page on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moekit.ablation.pairs import known_pairs
from moekit.cli import twin
from moekit.cli.program import main
from moekit.recipes import moe_lm
from moekit.runs import Run
from moekit.runs.plain import differences, flatten

SMALL = {
    "variant": "facts", "model.dim": 16, "model.heads": 2, "model.hidden_dim": 16, "model.num_experts": 2,
    "model.layers": 2, "data.vocab_size": 280, "data.babel_sentences": 400, "data.facts_entities": 20,
    "tasks.causal_lm.tokens": 128, "train.accelerator": "cpu", "train.warmup_steps": 1, "train.validate_every": 1,
    "evaluate.max_sentences": 10, "evaluate.valid_sentences": 10, "evaluate.samples": 0, "evaluate.facts": 1,
}  # fmt: skip


def run(folder: Path, *more: str, **given: Any) -> int:
    options = {**SMALL, "data.cache": folder / "cache", "out": folder / "a", "train.max_steps": 2, **given}
    return main(["run", "moe_lm", "--twin", *(f"--{name}={value}" for name, value in options.items()), *more])


def test_two_runs_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    said = capsys.readouterr().out
    page = tmp_path / "a" / twin.PAGE
    assert f"side by side {page}" in " ".join(said.split())
    assert "What one pair can say" in page.read_text(encoding="utf-8")
    assert "pairs of seeds" not in said, "a committed result is of other settings, and is not told"
    settings = [yaml.safe_load((tmp_path / name / "config.yaml").read_text("utf-8")) for name in ("a", "a-dense")]
    assert differences(*settings) == {"variant": ("facts", "facts_dense"), "model.num_experts": (2, 0)}
    assert flatten(settings[0])["train.max_minutes"] == 0, "no clock may end one of them"
    assert [Run.open(tmp_path / name).rest["global_step"] for name in ("a", "a-dense")] == [2, 2]
    assert run(tmp_path) == 2, "a folder that is there is refused before the first one trains"


@pytest.mark.slow
def test_both_are_gone_on_with(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    weights = Run.open(tmp_path / "a-dense").loaded.weights
    assert run(tmp_path, "--resume") == 0
    again = Run.open(tmp_path / "a-dense").loaded.weights
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.slow
def test_first_weights_are_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate of next to nothing, what both models have stays as both began."""
    monkeypatch.setattr(twin, "_compare", lambda *_: None)
    assert run(tmp_path, **{"train.learning_rate": 1e-30, "train.weight_decay": 0}) == 0
    one, other = (Run.open(tmp_path / name).loaded.weights for name in ("a", "a-dense"))
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    assert any("attention" in name for name in shared)
    assert all(torch.allclose(one[name], other[name]) for name in shared)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variant": "facts_dense"}, "--twin needs a variant with a dense twin: moe_lm has none of facts_dense."),
        ({"devices": 2}, "--twin trains two models one after the other in one process: got 2 devices"),
    ],
)
def test_what_has_no_twin_is_refused(
    given: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, **given) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a").exists()


def test_only_the_variant_as_it_is_has_known_results() -> None:
    known = known_pairs("moe_lm", "facts")
    assert len(known) == 2
    assert known[0].startswith("Over 5 pairs of seeds, test.causal_lm.loss differs by -0.1895 [-0.239, -0.1399]")
    assert known_pairs("moe_lm", "tiny") == []
    config = moe_lm.RECIPE.variants["facts"].config
    paired = config.changed(train={"max_minutes": 0.0, "init_by_name": True, "seed": 4}, data={"order_seed": 4})
    assert twin._as_published(moe_lm.RECIPE, "facts", paired)
    for changed in ({"train": {"max_steps": 10}}, {"model": {"dim": 32}}, {"data": {"facts_entities": 10}}):
        assert not twin._as_published(moe_lm.RECIPE, "facts", paired.changed(**changed))
