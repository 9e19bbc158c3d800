"""Runs aggregated with themselves, grown, pruned back, merged: what they compute stays, and what was done is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import COMMON, SIZES, E, equal, fails, network, resumed, slots, weights
from torch import Tensor

from moekit.cli.recipes import main as recipe_main
from moekit.errors import UserError
from moekit.recipes import st_moe, switch
from moekit.routing import Compensation
from moekit.runs import Run, RunText
from moekit.runs.plain import with_setting
from moekit.runs.surgery.compensating import with_choices
from moekit.runs.surgery.operations import aggregate_runs, change_run, merge_run, prune_run, upcycle_run
from moekit.runs.surgery.writing import write_run
from moekit.surgery import sparse_layers
from moekit.surgery.__main__ import main


@pytest.fixture(scope="module")
def single(runs: Path) -> Path:
    """A run whose tokens choose one expert by a softmax over all."""
    place = COMMON.index("--tasks.causal_lm.tokens")
    common = [*COMMON[:place], "--tasks.span_corruption.tokens", "256", *COMMON[place + 2 :]]
    options = [*common, *SIZES, "--model.dropout", "0", "--data.cache", str(runs / "cache")]
    assert recipe_main(switch.RECIPE, ["fit", *options, "--out", str(runs / "single")]) == 0
    return runs / "single"


@torch.no_grad()
def computed(folder: Path, state: dict[str, Tensor] | None = None) -> Tensor:
    subject = Run.load(folder)
    model = network(subject, subject.config, subject.loaded.weights)
    backbone, ids = model["backbone"], torch.arange(20).view(2, 10) + 5  # type: ignore[index]
    if hasattr(backbone, "encode"):
        memory = backbone.encode(ids).hidden
        return backbone.logits(backbone.decode(ids, memory).hidden)  # type: ignore[no-any-return]
    return backbone.logits(backbone.decode(ids).hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["one", "single"])
def test_aggregated_with_itself_and_pruned_back(
    name: str, runs: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, both, half = runs / name, tmp_path / "both", tmp_path / "half"
    assert main(["aggregate", str(run), str(run), "--out", str(both)]) == 0
    said = capsys.readouterr().out
    chosen = "a token chooses 4 experts instead of 2" if name == "one" else "experts' outputs times 2"
    assert f"compensated  {chosen} (--plain leaves it out)" in said
    torch.testing.assert_close(computed(both), computed(run))
    record = json.loads((both / "surgery.json").read_text())
    assert record["compensated_copies"] == 2
    needed = {"choices": 2, "scale": 1} if name == "one" else {"choices": 1, "scale": 2}
    assert {
        tuple(sorted((k, v) for k, v in row.items() if k in needed)) for row in record["compensation"].values()
    } == {tuple(sorted(needed.items()))}

    subject = Run.load(both)
    write_run(prune_run(subject, {path: torch.arange(E) for path in subject.layers()}), half)
    assert equal(weights(half), weights(run))
    assert Run.load(half).config == Run.load(run).config
    former = slots(Run.load(run))
    for key, found in slots(Run.load(half)).items():
        torch.testing.assert_close(found["exp_avg"], former[key]["exp_avg"])
    # What is left of three quarters of it makes up for 1.5 copies; of fewer than the parent had, for one.
    for keep, copies in ((6, 1.5), (2, 1.0)):
        result = prune_run(subject, {path: torch.arange(keep) for path in subject.layers()})
        assert result.record["compensated_copies"] == copies
        assert result.config.model.num_experts == keep
        if name == "one":
            assert result.config.model.k == int(2 * copies)
    plain = prune_run(subject, {path: torch.arange(E) for path in subject.layers()}, compensated=False)
    assert plain.record["compensated_copies"] == 2
    assert equal(plain.weights, weights(run)) == (name == "one")


def test_training_on_and_other_settings_do_not_lose_the_record(runs: Path, tmp_path: Path) -> None:
    both, other = tmp_path / "both", tmp_path / "other"
    assert main(["aggregate", str(runs / "one"), str(runs / "one"), "--out", str(both)]) == 0
    assert list(resumed(both, 4)) == [3]
    last = Run.load(both / "checkpoints" / "last.ckpt")
    assert last.config.model.k == 4
    back = prune_run(last, {path: torch.arange(E) for path in last.layers()})
    assert (back.config.model.k, back.record["compensated_copies"]) == (2, 1)
    write_run(change_run(last, with_setting(last.config, "model.capacity_factor", 2.0)), other)
    again = Run.load(other)
    assert prune_run(again, {path: torch.arange(E) for path in again.layers()}).config.model.k == 2
    four = aggregate_runs([again, again])
    assert four.record["compensated_copies"] == 4


def test_the_plain_form(runs: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both"
    assert main(["aggregate", str(single), str(single), "--plain", "--out", str(out)]) == 0
    assert "compensated" not in capsys.readouterr().out
    assert "compensated_copies" not in json.loads((out / "surgery.json").read_text())
    both, one = weights(out), weights(single)
    name = next(name for name in one if name.endswith("experts.w_out"))
    assert torch.equal(both[name], torch.cat([one[name]] * 2))
    assert not torch.allclose(computed(out), computed(single), atol=1e-3)
    assert aggregate_runs([Run.load(runs / "one")] * 2, compensated=False).config.model.k == 2


def test_growing_keeps_the_function(runs: Path, single: Path, tmp_path: Path) -> None:
    for name, k in (("one", 4), ("single", 1)):
        subject = Run.load(runs / name)
        write_run(upcycle_run(subject, 2 * E), tmp_path / name)
        torch.testing.assert_close(computed(tmp_path / name), computed(runs / name))
        assert Run.load(tmp_path / name).config.model.k == k
        uneven = upcycle_run(subject, E + 2)
        assert f"{E + 2} experts are no whole multiple" in uneven.said
        assert "compensated_copies" not in uneven.record
        assert upcycle_run(subject, 2 * E, compensated=False).said == ""


def test_merging_takes_back_what_made_up_for_weights(single: Path, tmp_path: Path) -> None:
    """The average of two equal sets of experts is that of one."""
    both = tmp_path / "both"
    assert main(["aggregate", str(single), str(single), "--out", str(both)]) == 0
    merged, alone = merge_run(Run.load(both)), merge_run(Run.load(single))
    assert merged.weights.keys() == alone.weights.keys()
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(merged.weights[name], tensor)


def test_without_a_setting_for_choices_it_is_refused(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moekit.runs.surgery.compensating.getattr", lambda *_: None, raising=False)
    message = "recipe moe_lm has no setting for that (model.k). With --plain"
    assert fails(["aggregate", str(runs / "one"), str(runs / "two")], tmp_path / "none", message)


def test_experts_keep_their_slots_where_capacity_counts_tokens() -> None:
    """ST-MoE's factor * T / E: of twice as many experts it must be twice the factor."""
    config: Any = st_moe.RECIPE.variants["tiny"].config
    layers = sparse_layers(st_moe.RECIPE.parts(config, RunText(100), "meta").named())
    subject: Any = SimpleNamespace(path="run", recipe=st_moe.RECIPE)
    needed = dict.fromkeys(layers, Compensation(choices=2.0))
    wide = with_setting(with_choices(subject, config, layers, needed), "model.num_experts", 16)
    assert (wide.model.k, wide.model.capacity_factor, wide.model.eval_capacity_factor) == (4, 2.5, 4.0)
    slots = []
    for one in (config, wide):
        router: Any = next(
            layer.routing_module
            for layer in sparse_layers(st_moe.RECIPE.parts(one, RunText(100), "meta").named()).values()
        )
        slots.append([router.capacity.slots(4096, router.num_experts, router.k, training=t) for t in (True, False)])
    assert slots[0] == slots[1]


def test_a_record_that_is_none_is_named(runs: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    assert main(["aggregate", str(runs / "one"), str(runs / "one"), "--out", str(both)]) == 0
    (both / "surgery.json").write_text("{")
    subject = Run.load(both)
    with pytest.raises(UserError, match=r"surgery\.json must be what moekit\.surgery wrote"):
        prune_run(subject, {path: torch.arange(E) for path in subject.layers()})
