"""Surgery on small runs, each operation and the pruning curve: what comes out is tested and continues training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import COMMON, SIZES, E, equal, fails, network, resumed, slots, weights
from torch import Tensor

from moekit.cli.recipes import main as recipe_main
from moekit.errors import UserError
from moekit.recipes import base_layers, moe_lm
from moekit.report.pruning import write_curve
from moekit.runs import Run
from moekit.runs.plain import with_setting
from moekit.runs.surgery.curve import Recovery, pruning_curve
from moekit.runs.surgery.operations import change_run, prune_run, split_run, upcycle_run
from moekit.runs.surgery.utilisation import measured_load
from moekit.runs.surgery.writing import write_run
from moekit.surgery import choose_experts, sparse_layers
from moekit.surgery.__main__ import main
from moekit.training.callbacks.config import CONFIG_KEY

# -- aggregate -----------------------------------------------------------------------------------------------------


def test_aggregate_is_tested_and_goes_on(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both"
    one, two = runs / "one", runs / "two"
    assert main(["aggregate", str(one), str(two), "--shared", "1", "--out", str(out)]) == 0
    assert "8 experts in a layer" in capsys.readouterr().out
    both = Run.load(out)
    assert both.config.model.num_experts == 2 * E

    # The first model's experts alone: its weights and its Adam moments, bit for bit.
    layers = both.layers()
    back = prune_run(both, {path: torch.arange(E) for path in layers})
    assert equal(back.weights, weights(one))
    former, moments = slots(Run.load(one)), back.slots
    assert moments is not None
    assert moments.keys() == former.keys()
    experts = {name for layer in layers.values() for name in layer.dims}
    for name in experts:
        assert torch.equal(moments[name]["exp_avg"], former[name]["exp_avg"])
        assert torch.equal(moments[name]["exp_avg_sq"], former[name]["exp_avg_sq"])

    assert recipe_main(moe_lm.RECIPE, ["test", "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["evaluated_step"] == 3
    found = resumed(out, 5)
    assert list(found) == [3, 4]  # steps are counted from 0
    assert all(0 < loss < 10 for loss in found.values())
    trained = Run.load(out / "checkpoints" / "last.ckpt")
    assert trained.loaded.rest["global_step"] == 5
    optimizer = trained.loaded.optimizer
    assert optimizer is not None
    assert all(group["fused"] for group in optimizer["param_groups"])


def test_aggregate_with_the_mean_fresh_gates_and_a_new_clock(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "both"
    options = ["--gates", "fresh", "--restart", "--seed", "5", "--out", str(out)]
    assert main(["aggregate", str(runs / "one"), str(runs / "two"), *options]) == 0
    both, one, two = weights(out), weights(runs / "one"), weights(runs / "two")
    embedding = "backbone.embedding.weight"
    torch.testing.assert_close(both[embedding], (one[embedding] + two[embedding]) / 2)
    gate = "backbone.decoder.layers.1.feed_forward.router.weight"
    assert both[gate].shape == (2 * E, 16)
    assert not torch.equal(both[gate][:E], one[gate])
    state = slots(Run.load(out))
    assert gate not in state
    assert float(state[embedding]["step"]) == 3  # the larger of 3 and 2
    assert list(resumed(out, 2)) == [0, 1]


# -- prune ---------------------------------------------------------------------------------------------------------


def test_prune_by_use_of_a_language(runs: Path, tmp_path: Path) -> None:
    subject = Run.load(runs / "one")
    load = measured_load(subject, language="tnd")
    assert not torch.equal(next(iter(load.values())), next(iter(measured_load(subject).values())))
    out = tmp_path / "tnd"
    assert main(["prune", str(runs / "one"), "--keep", "50%", "--language", "tnd", "--out", str(out)]) == 0
    kept = choose_experts(subject.layers(), 2, load=load)
    record = json.loads((out / "surgery.json").read_text())
    assert record["experts"] == {path: numbers.tolist() for path, numbers in kept.items()}
    assert (record["by"], record["language"]) == ("utilisation", "tnd")
    pruned, whole = weights(out), weights(runs / "one")
    moments, former = slots(Run.load(out)), slots(subject)
    for path, layer in subject.layers().items():
        for name in layer.dims:
            assert torch.equal(pruned[name], whole[name][kept[path]])
            assert torch.equal(moments[name]["exp_avg"], former[name]["exp_avg"][kept[path]])
            assert float(moments[name]["step"]) == float(former[name]["step"])
    assert recipe_main(moe_lm.RECIPE, ["test", "--out", str(out)]) == 0
    assert list(resumed(out, 4)) == [3]


def test_use_is_read_from_the_test_or_measured(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `test` wrote is what is measured; the file is not believed about another checkpoint."""
    copy = tmp_path / "copy"
    shutil.copytree(runs / "one", copy)
    measured = measured_load(Run.load(copy))
    assert recipe_main(moe_lm.RECIPE, ["test", "--out", str(copy)]) == 0
    monkeypatch.setattr("moekit.runs.surgery.utilisation.validate", lambda *_: pytest.fail("measured again"))
    written = measured_load(Run.load(copy))
    for path, load in measured.items():
        torch.testing.assert_close(written[path], load)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measured_load(Run.load(copy / "checkpoints" / "last.ckpt"))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measured_load(Run.load(copy), task="causal_lm")


def test_pruning_nothing_writes_the_same_run(runs: Path, tmp_path: Path) -> None:
    assert main(["prune", str(runs / "one"), "--keep", "1.0", "--by", "random", "--out", str(tmp_path / "same")]) == 0
    one, same = Run.load(runs / "one"), Run.load(tmp_path / "same")
    assert equal(one.loaded.weights, same.loaded.weights)
    assert one.config == same.config
    former, now = one.loaded.optimizer, same.loaded.optimizer
    assert former is not None
    assert now is not None
    assert former["param_groups"] == now["param_groups"]
    torch.testing.assert_close(now["state"], former["state"], rtol=0, atol=0)


# -- upcycle, merge, split, change ---------------------------------------------------------------------------------


def test_upcycle_and_merge(runs: Path, tmp_path: Path) -> None:
    """The dense twin is two experts wide: experts are its halves in turn, and merging them gives it back."""
    out, back = tmp_path / "sparse", tmp_path / "dense"
    assert main(["upcycle", str(runs / "dense"), "--experts", "4", "--out", str(out)]) == 0
    sparse, dense = Run.load(out), Run.load(runs / "dense")
    path = next(iter(sparse.layers()))
    wide = dense.loaded.weights[f"{path}.w_in.weight"]
    bank = sparse.loaded.weights[f"{path}.experts.w_in"]
    assert torch.equal(bank, torch.stack([wide[:8].t(), wide[8:].t()] * 2))
    moments, former = slots(sparse), slots(dense)
    second = former[f"{path}.w_out.weight"]["exp_avg_sq"]
    assert torch.equal(moments[f"{path}.experts.w_out"]["exp_avg_sq"][3], second[:, 8:].t())
    assert float(moments[f"{path}.experts.w_out"]["step"]) == 3
    assert f"{path}.router.weight" not in moments
    assert list(resumed(out, 5)) == [3, 4]

    assert main(["merge", str(out), "--restart", "--out", str(back)]) == 0
    assert Run.load(back).config.model.num_experts == 0
    assert list(resumed(back, 2)) == [0, 1]


def test_upcycling_a_sparse_run_copies_experts(runs: Path) -> None:
    subject = Run.load(runs / "one")
    more = upcycle_run(subject, 6)
    assert more.config.model.num_experts == 6
    path = next(iter(subject.layers()))
    assert torch.equal(more.weights[f"{path}.experts.w_in"][4:], subject.loaded.weights[f"{path}.experts.w_in"][:2])
    noisy = upcycle_run(subject, 6, noise=0.1, seed=1)
    assert not torch.equal(noisy.weights[f"{path}.experts.w_in"][4], noisy.weights[f"{path}.experts.w_in"][0])
    assert noisy.slots is not None
    assert f"{path}.experts.w_in" not in noisy.slots
    assert "backbone.embedding.weight" in noisy.slots
    with pytest.raises(UserError, match="has 4 experts, and upcycling gives 3, no fewer"):
        upcycle_run(subject, 3)
    with pytest.raises(UserError, match="scale is for upcycling dense models"):
        upcycle_run(subject, 6, scale=2.0)


def test_noise_on_copies_of_stacks_is_on_their_matrices_alone(runs: Path, tmp_path: Path) -> None:
    options = [*COMMON, "--data.cache", str(runs / "cache"), *SIZES, "--out", str(tmp_path / "base")]
    assert recipe_main(base_layers.RECIPE, ["fit", *options]) == 0
    subject = Run.load(tmp_path / "base")
    noisy = upcycle_run(subject, 8, noise=0.1)
    assert noisy.slots is not None
    (layer,) = subject.layers().values()
    for name in layer.bank_axes:
        copied = subject.loaded.weights[name].repeat(2, *[1] * (subject.loaded.weights[name].ndim - 1))
        matrix = name.endswith(("w_in", "w_out"))
        assert torch.equal(noisy.weights[name], copied) != matrix, name
        assert (name in noisy.slots) != matrix, name


@torch.no_grad()
def logits(model: Any) -> Tensor:
    backbone = model["backbone"]
    found: Tensor = backbone.logits(backbone.decode(torch.arange(20).view(2, 10) + 5).hidden)
    return found


def test_split_keeps_the_function(fine_grained: Path, runs: Path, tmp_path: Path) -> None:
    subject = Run.load(fine_grained)
    result = split_run(subject, 2)
    assert (result.config.model.num_experts, result.config.model.k, result.config.model.hidden_dim) == (12, 4, 4)
    before = logits(network(subject, subject.config, subject.loaded.weights))
    torch.testing.assert_close(logits(network(subject, result.config, result.weights)), before)
    write_run(result, tmp_path / "fine")
    assert Run.load(tmp_path / "fine").layers().popitem()[1].k == 4
    # Its dense layers are as wide as its experts: one setting for both.
    with pytest.raises(UserError, match=r"in moe_lm the setting model.hidden_dim is that of dense layers too"):
        split_run(Run.load(runs / "one"), 2)


@pytest.mark.parametrize("operation", ["change", "prune", "aggregate"])
def test_what_is_made_of_a_smoke_test_is_called_one(operation: str, runs: Path, tmp_path: Path) -> None:
    """The label of no result goes with the weights, through a test and further training."""
    smoke, out = tmp_path / "smoke", tmp_path / "new"
    shutil.copytree(runs / "one", smoke)
    assert "smoke" not in Run.load(smoke).settings
    settings = Run.load(smoke).settings | {"smoke": True}
    for file in (smoke / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        torch.save(checkpoint | {CONFIG_KEY: checkpoint[CONFIG_KEY] | {"smoke": True}}, file)
    (smoke / "config.yaml").write_text(yaml.safe_dump(settings))
    options = {
        "change": [str(smoke), "--set", "model.capacity_factor=2.0"],
        "prune": [str(smoke), "--keep", "2"],
        "aggregate": [str(runs / "two"), str(smoke)],
    }
    assert main([operation, *options[operation], "--out", str(out)]) == 0
    assert Run.load(out).settings["smoke"] is True
    again = ["--config", str(out / "config.yaml"), "--out", str(out), "--resume", "--train.max_steps", "4"]
    assert recipe_main(moe_lm.RECIPE, ["fit", *again]) == 0
    assert recipe_main(moe_lm.RECIPE, ["test", "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["smoke"] is True


def test_change(runs: Path, fine_grained: Path, tmp_path: Path) -> None:
    subject = Run.load(fine_grained)
    changed = change_run(subject, with_setting(subject.config, "model.k", 3))
    assert changed.record["settings"] == {"model.k": 3}
    assert sparse_layers(subject.model(changed.config)).popitem()[1].k == 3
    out = tmp_path / "roomy"
    assert main(["change", str(runs / "one"), "--set", "model.capacity_factor=2.0", "--out", str(out)]) == 0
    assert Run.load(out).config.model.capacity_factor == 2.0
    assert equal(weights(out), weights(runs / "one"))
    for setting, message in (
        ("model.num_experts=2", "must have shape"),
        ("model.dimm=2", "unknown option --model.dimm. Did you mean --model.dim?"),
        ("model.capacity_factor=much", "model.capacity_factor"),
        ("model.dim", "must be KEY=VALUE"),
    ):
        assert fails(["change", str(runs / "one"), "--set", setting], tmp_path / "none", message)


# -- the curve -----------------------------------------------------------------------------------------------------


def test_curve(runs: Path, tmp_path: Path) -> None:
    subject = Run.load(runs / "one")
    curve = pruning_curve(subject, [3, 0.5], draws=2, recovery=Recovery(1, 1e-3))
    assert [(p.keep, p.order, p.seed) for p in curve.points] == [
        (keep, order, seed)
        for keep in (3, 0.5)
        for order, seed in (("utilisation", None), ("reversed", None), ("random", 0), ("random", 1))
    ]
    assert curve.task == "causal_lm"
    smaller = {p.parameters for p in curve.points}
    assert max(smaller) < curve.whole.parameters
    assert len(smaller) == 2
    assert all(0 < p.loss < 10 for p in (curve.whole, *curve.points))
    assert all(p.recovered is not None and p.recovered != p.loss for p in (curve.whole, *curve.points))
    # Where the least used experts go, nearly nothing is lost; the function differs all the same.
    assert len({round(p.loss, 7) for p in curve.points}) > 3
    write_curve(curve, tmp_path)
    text = (tmp_path / "pruning.md").read_text()
    assert text.splitlines()[2].startswith(f"| all | {curve.whole.parameters:,} |")
    assert "| 50% |" in text
    assert len(json.loads((tmp_path / "pruning.json").read_text())["points"]) == 8
    assert "</svg>" in (tmp_path / "pruning.svg").read_text()
