"""``python -m moekit.surgery`` on small runs: what comes out is tested, continues training, or was never written."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.parallel.checkpoint import Checkpointer
from moekit.recipes import moe_lm, shazeer
from moekit.recipes._command import main as recipe_main
from moekit.recipes._parts import make_optimizer
from moekit.recipes._surgery.curve import Recovery, pruning_curve, write_curve
from moekit.recipes._surgery.inspection import inspect
from moekit.recipes._surgery.operations import change_run, prune_run, split_run, upcycle_run
from moekit.recipes._surgery.subject import Subject, open_subject, with_setting
from moekit.recipes._surgery.utilisation import measured_load
from moekit.recipes._surgery.writing import write_run
from moekit.surgery import choose_experts, sparse_layers
from moekit.surgery.__main__ import COMMANDS, main

E = 4
COMMON = [
    "--data.babel_languages", "2", "--data.babel_sentences", "300", "--data.vocab_size", "400",
    "--data.max_length", "64", "--tasks.causal_lm.tokens", "128", "--train.max_steps", "3",
    "--train.warmup_steps", "1", "--train.log_every", "1", "--train.validate_every", "3", "--train.accelerator", "cpu",
    "--evaluate.max_sentences", "2", "--evaluate.valid_sentences", "4", "--evaluate.samples", "0",
]  # fmt: skip
SIZES = [
    "--model.dim", "16", "--model.heads", "2", "--model.hidden_dim", "8", "--model.num_experts", str(E),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs one, two (another start), dense (the twin) and wide (another dimension)."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*COMMON, "--data.cache", str(folder / "cache")]
    for name, options in (
        ("one", SIZES),
        ("two", [*SIZES, "--train.seed", "2", "--train.max_steps", "2"]),
        ("dense", [*SIZES[:-1], "0"]),
        ("wide", [*SIZES, "--model.dim", "32", "--train.max_steps", "2"]),
    ):
        assert recipe_main(moe_lm.RECIPE, ["fit", *common, *options, "--out", str(folder / name)]) == 0
    return folder


@pytest.fixture(scope="module")
def fine_grained(runs: Path) -> Path:
    """A run of a recipe in which k is a setting."""
    options = [*COMMON, "--data.cache", str(runs / "cache"), "--model.dim", "16", "--model.hidden_dim", "8"]
    options += ["--model.num_experts", "6", "--model.k", "2", "--out", str(runs / "fine")]
    assert recipe_main(shazeer.RECIPE, ["fit", *options]) == 0
    return runs / "fine"


def weights(folder: Path) -> dict[str, Tensor]:
    return open_subject(folder).loaded.weights


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def slots(subject: Subject) -> dict[str, dict[str, Any]]:
    found = subject.slots()
    assert found is not None
    return found


def losses(folder: Path) -> dict[int, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def resumed(folder: Path, steps: int) -> dict[int, float]:
    """Train on as the command's last line says; losses by step."""
    options = ["--config", str(folder / "config.yaml"), "--out", str(folder), "--resume"]
    assert recipe_main(moe_lm.RECIPE, ["fit", *options, "--train.max_steps", str(steps)]) == 0
    return losses(folder)


# -- aggregate -----------------------------------------------------------------------------------------------------


def test_aggregate_is_tested_and_goes_on(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both"
    one, two = runs / "one", runs / "two"
    assert main(["aggregate", str(one), str(two), "--shared", "1", "--out", str(out)]) == 0
    assert "8 experts in a layer" in capsys.readouterr().out
    both = open_subject(out)
    assert both.config.model.num_experts == 2 * E

    # The first model's experts alone: its weights and its Adam moments, bit for bit.
    layers = both.layers()
    back = prune_run(both, {path: torch.arange(E) for path in layers})
    assert equal(back.weights, weights(one))
    former, moments = slots(open_subject(one)), back.slots
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
    trained = open_subject(out / "checkpoints" / "last.ckpt")
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
    state = slots(open_subject(out))
    assert gate not in state
    assert float(state[embedding]["step"]) == 3  # the larger of 3 and 2
    assert list(resumed(out, 2)) == [0, 1]


# -- prune ---------------------------------------------------------------------------------------------------------


def test_prune_by_use_of_a_language(runs: Path, tmp_path: Path) -> None:
    subject = open_subject(runs / "one")
    load = measured_load(subject, language="tnd")
    assert not torch.equal(next(iter(load.values())), next(iter(measured_load(subject).values())))
    out = tmp_path / "tnd"
    assert main(["prune", str(runs / "one"), "--keep", "50%", "--language", "tnd", "--out", str(out)]) == 0
    kept = choose_experts(subject.layers(), 2, load=load)
    record = json.loads((out / "surgery.json").read_text())
    assert record["experts"] == {path: numbers.tolist() for path, numbers in kept.items()}
    assert (record["by"], record["language"]) == ("utilisation", "tnd")
    pruned, whole = weights(out), weights(runs / "one")
    moments, former = slots(open_subject(out)), slots(subject)
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
    measured = measured_load(open_subject(copy))
    assert recipe_main(moe_lm.RECIPE, ["test", "--out", str(copy)]) == 0
    monkeypatch.setattr("moekit.recipes._surgery.utilisation.validate", lambda *_: pytest.fail("measured again"))
    written = measured_load(open_subject(copy))
    for path, load in measured.items():
        torch.testing.assert_close(written[path], load)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measured_load(open_subject(copy / "checkpoints" / "last.ckpt"))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measured_load(open_subject(copy), task="causal_lm")


def test_pruning_nothing_writes_the_same_run(runs: Path, tmp_path: Path) -> None:
    assert main(["prune", str(runs / "one"), "--keep", "1.0", "--by", "random", "--out", str(tmp_path / "same")]) == 0
    one, same = open_subject(runs / "one"), open_subject(tmp_path / "same")
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
    sparse, dense = open_subject(out), open_subject(runs / "dense")
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
    assert open_subject(back).config.model.num_experts == 0
    assert list(resumed(back, 2)) == [0, 1]


def test_upcycling_a_sparse_run_copies_experts(runs: Path) -> None:
    subject = open_subject(runs / "one")
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


def network(subject: Subject, config: Any, state: dict[str, Tensor]) -> nn.Module:
    model = subject.model(config, device="cpu")
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    backbone = model["backbone"]
    found: Tensor = backbone.logits(backbone.decode(torch.arange(20).view(2, 10) + 5).hidden)
    return found


def test_split_keeps_the_function(fine_grained: Path, runs: Path, tmp_path: Path) -> None:
    subject = open_subject(fine_grained)
    result = split_run(subject, 2)
    assert (result.config.model.num_experts, result.config.model.k, result.config.model.hidden_dim) == (12, 4, 4)
    before = logits(network(subject, subject.config, subject.loaded.weights))
    torch.testing.assert_close(logits(network(subject, result.config, result.weights)), before)
    write_run(result, tmp_path / "fine")
    assert open_subject(tmp_path / "fine").layers().popitem()[1].k == 4
    with pytest.raises(UserError, match=r"a token's choices are a setting \(model.k\): moe_lm has 2"):
        split_run(open_subject(runs / "one"), 2)


def test_change(runs: Path, fine_grained: Path, tmp_path: Path) -> None:
    subject = open_subject(fine_grained)
    changed = change_run(subject, with_setting(subject.config, "model.k", 3))
    assert changed.record["settings"] == {"model.k": 3}
    assert sparse_layers(subject.model(changed.config)).popitem()[1].k == 3
    out = tmp_path / "roomy"
    assert main(["change", str(runs / "one"), "--set", "model.capacity_factor=2.0", "--out", str(out)]) == 0
    assert open_subject(out).config.model.capacity_factor == 2.0
    assert equal(weights(out), weights(runs / "one"))
    for setting, message in (
        ("model.num_experts=2", "must have shape"),
        ("model.dimm=2", "unknown option --model.dimm. Did you mean --model.dim?"),
        ("model.capacity_factor=much", "model.capacity_factor"),
        ("model.dim", "must be KEY=VALUE"),
    ):
        assert fails(["change", str(runs / "one"), "--set", setting], tmp_path / "none", message)


# -- inspect -------------------------------------------------------------------------------------------------------


def test_inspect(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(runs / "one"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["variant"], found["step"], found["optimizer"]) == ("moe_lm", "tiny", 3, True)
    assert [(row["name"], row["num_experts"], row["k"]) for row in found["layers"]] == [
        ("decoder.1", E, 2),
        ("decoder.3", E, 2),
    ]
    assert found["layers"][0]["expert_parameters"] == 2 * 16 * 8
    assert found["layers"][0]["bytes"] == 4 * E * 2 * 16 * 8
    assert found["layers"][0]["load"] is None
    assert found["parameters"] == sum(tensor.numel() for tensor in weights(runs / "one").values())

    assert main(["inspect", str(runs / "dense")]) == 0
    assert "a dense model: no experts" in capsys.readouterr().out
    copy = tmp_path / "copy"
    shutil.copytree(runs / "one", copy)
    assert recipe_main(moe_lm.RECIPE, ["test", "--out", str(copy)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "use" in shown
    assert "█" in shown

    plain = tmp_path / "weights.pt"
    torch.save(dict(weights(runs / "one")), plain)
    assert main(["inspect", str(plain)]) == 0
    assert "tensors without a configuration" in capsys.readouterr().out
    assert main(["inspect", str(plain), "--config", str(runs / "one" / "config.yaml")]) == 0
    assert "decoder.3" in capsys.readouterr().out


# -- other kinds of checkpoints ------------------------------------------------------------------------------------


def test_plain_state_dicts_and_safetensors_become_runs(runs: Path, tmp_path: Path) -> None:
    config = str(runs / "one" / "config.yaml")
    torch.save(dict(weights(runs / "one")), tmp_path / "plain.pt")
    save_file({n: t.clone() for n, t in weights(runs / "two").items()}, tmp_path / "other.safetensors")
    out = tmp_path / "both"
    given = [str(tmp_path / "plain.pt"), str(tmp_path / "other.safetensors"), "--config", config]
    assert main(["aggregate", *given, "--shared", "2", "--out", str(out)]) == 0
    layers = open_subject(out).layers()
    assert {layer.num_experts for layer in layers.values()} == {2 * E}
    assert list(resumed(out, 2)) == [0, 1]  # no clock that could go on


def test_sharded_checkpoints_are_read(runs: Path, tmp_path: Path) -> None:
    subject = open_subject(runs / "one")
    model = network(subject, subject.config, subject.loaded.weights)
    optimizer = make_optimizer(subject.config.train, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    sharded = tmp_path / "sharded"
    Checkpointer().save(sharded, model, [optimizer])
    found = open_subject(sharded, runs / "one" / "config.yaml")
    assert equal(found.loaded.weights, dict(model.state_dict()))
    assert inspect(sharded)["parameters"] == sum(p.numel() for p in model.parameters())
    result = prune_run(found, {path: torch.tensor([0, 2]) for path in found.layers()})
    name = "backbone.decoder.layers.1.feed_forward.experts.w_in"
    assert result.slots is not None
    expected = optimizer.state[model.get_parameter(name)]["exp_avg"][[0, 2]]
    assert torch.equal(result.slots[name]["exp_avg"], expected)
    next(sharded.glob("**/*.safetensors")).unlink()
    assert fails(
        ["prune", str(sharded), "--keep", "2", "--config", str(runs / "one" / "config.yaml")],
        tmp_path / "none",
        "sharded",
    )


def test_a_run_of_a_strategy_becomes_one(runs: Path, tmp_path: Path) -> None:
    """Sharded in, sharded out: what ``--strategy`` resumes from."""
    subject = open_subject(runs / "one")
    divided = change_run(subject, with_setting(subject.config, "strategy.expert_parallel_size", 1))
    folder = write_run(divided, tmp_path / "divided")
    last = folder.last_checkpoint
    assert last is not None
    assert last.is_dir()
    again = open_subject(tmp_path / "divided")
    assert equal(again.loaded.weights, weights(runs / "one"))
    torch.testing.assert_close(slots(again), slots(subject), rtol=0, atol=0)
    assert again.loaded.rest["global_step"] == 3
    assert again.loaded.rest["loops"] == subject.loaded.rest["loops"]


# -- the curve -----------------------------------------------------------------------------------------------------


def test_curve(runs: Path, tmp_path: Path) -> None:
    subject = open_subject(runs / "one")
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


# -- bad input -----------------------------------------------------------------------------------------------------


def fails(arguments: list[str], out: Path, message: str) -> bool:
    """The command ends with code 2 and the message, and leaves nothing."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main([*arguments, "--out", str(out)])
    text = said.getvalue()
    assert message in text, text
    assert code == 2
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return True


def test_bad_input(runs: Path, tmp_path: Path) -> None:
    one, out = str(runs / "one"), tmp_path / "out"
    noise, broken = tmp_path / "noise.ckpt", tmp_path / "broken.ckpt"
    noise.write_bytes(b"no checkpoint")
    whole = (runs / "one" / "checkpoints" / "last.ckpt").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    plain = tmp_path / "plain.pt"
    torch.save(dict(weights(runs / "one")), plain)
    for arguments, message in (
        (["prune", str(noise), "--keep", "2"], "noise.ckpt"),
        (["prune", str(broken), "--keep", "2"], "broken.ckpt"),
        (["prune", str(tmp_path / "missing"), "--keep", "2"], "missing"),
        (["prune", str(plain), "--keep", "2"], "does not say what model it is of"),
        (["prune", one, "--keep", "5"], "feed_forward, it has no more: got keep=5"),
        (["prune", one, "--keep", "1"], "a token chooses as many"),
        (["prune", one, "--keep", "2", "--language", "xx"], "--language must be one of avl, tnd"),
        (["prune", one, "--keep", "2", "--task", "xx"], "--task must be one of causal_lm"),
        (["prune", one, "--keep", "2", "--by", "random", "--language", "avl"], "leave them out"),
        (["prune", str(runs / "dense"), "--keep", "2"], "it is a dense model"),
        (["merge", str(runs / "dense")], "it is a dense model"),
        (["aggregate", one], "needs two or more runs"),
        (["aggregate", one, str(runs / "wide")], "setting model.dim"),
        (["aggregate", one, str(runs / "two"), "--shared", "3"], "--shared must be mean or the number of a run"),
        (["upcycle", str(runs / "dense"), "--experts", "3"], "divides the number of experts"),
        (["upcycle", str(runs / "dense"), "--experts", "4", "--noise", "-1"], "--noise must not be negative"),
    ):
        assert fails(arguments, out, message)


def test_models_of_another_vocabulary_are_not_mixed(runs: Path, tmp_path: Path) -> None:
    """The same sizes, and other pieces: only the settings tell."""
    other = tmp_path / "other"
    shutil.copytree(runs / "two", other)
    checkpoint = torch.load(other / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["moekit_config"]["data"]["seed"] = 7
    torch.save(checkpoint, other / "checkpoints" / "last.ckpt")
    assert fails(["aggregate", str(runs / "one"), str(other)], tmp_path / "out", "must have the setting data.seed")
    # A table of another size is found by its shape.
    name = "backbone.embedding.weight"
    checkpoint["moekit_config"]["data"]["seed"] = 1
    checkpoint["state_dict"][name] = torch.cat([checkpoint["state_dict"][name]] * 2)
    torch.save(checkpoint, other / "checkpoints" / "last.ckpt")
    assert fails(["aggregate", str(runs / "one"), str(other)], tmp_path / "out", f"{name} must have the shape")
    # Weights that are not those of the configuration are named.
    del checkpoint["state_dict"]["backbone.decoder.norm.weight"]
    torch.save(checkpoint, other / "checkpoints" / "last.ckpt")
    assert fails(
        ["prune", str(other), "--keep", "2"], tmp_path / "out", "backbone.decoder.norm.weight of shape (16,) is"
    )


def test_an_existing_run_is_not_touched_unasked(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(runs / "two", out)
    (out / "notes.txt").write_text("mine")
    before = sorted(path.name for path in out.iterdir())
    arguments = ["prune", str(runs / "one"), "--keep", "3", "--by", "random", "--out", str(out)]
    assert main(arguments) == 2
    assert sorted(path.name for path in out.iterdir()) == before
    assert main([*arguments, "--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "metrics.csv").exists()
    assert open_subject(out).config.model.num_experts == 3
    assert not list(tmp_path.glob(".out*"))


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0
        assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["prune", "somewhere", "--keep", "half", "--out", "x"])
    assert done.value.code == 2
    assert "a number of experts (4), or a share of them" in capsys.readouterr().err
