"""``python -m moekit.surgery``: what it shows, which kinds of checkpoints it reads, what it refuses or leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_runs import E, equal, fails, network, resumed, slots, weights

from moekit.cli.program import SURGERY
from moekit.cli.recipes import main as recipe_main
from moekit.parallel.checkpoint import Checkpointer
from moekit.recipes import moe_lm
from moekit.runs import Run
from moekit.runs.plain import with_setting
from moekit.runs.surgery.inspection import inspect
from moekit.runs.surgery.operations import change_run, prune_run
from moekit.runs.surgery.writing import write_run
from moekit.surgery.__main__ import main

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
    layers = Run.load(out).layers()
    assert {layer.num_experts for layer in layers.values()} == {2 * E}
    assert list(resumed(out, 2)) == [0, 1]  # no clock that could go on


def test_sharded_checkpoints_are_read(runs: Path, tmp_path: Path) -> None:
    subject = Run.load(runs / "one")
    model = network(subject, subject.config, subject.loaded.weights)
    optimizer = subject.config.train.make_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    sharded = tmp_path / "sharded"
    Checkpointer().save(sharded, model, [optimizer])
    found = Run.load(sharded, runs / "one" / "config.yaml")
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
    subject = Run.load(runs / "one")
    divided = change_run(subject, with_setting(subject.config, "strategy.expert_parallel_size", 1))
    folder = write_run(divided, tmp_path / "divided")
    last = folder.last_checkpoint
    assert last is not None
    assert last.is_dir()
    again = Run.load(tmp_path / "divided")
    assert equal(again.loaded.weights, weights(runs / "one"))
    torch.testing.assert_close(slots(again), slots(subject), rtol=0, atol=0)
    assert again.loaded.rest["global_step"] == 3
    assert again.loaded.rest["loops"] == subject.loaded.rest["loops"]


# -- bad input -----------------------------------------------------------------------------------------------------


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
        (
            ["upcycle", str(runs / "dense"), "--experts", "4", "--noise", "-1"],
            "--noise: must be a number, 0 or more",
        ),
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
    table = checkpoint["state_dict"][name]
    checkpoint["state_dict"][name] = torch.cat([table] * 2)
    torch.save(checkpoint, other / "checkpoints" / "last.ckpt")
    assert fails(["aggregate", str(runs / "one"), str(other)], tmp_path / "out", f"{name} must have shape")
    # Weights that are not those of the configuration are named.
    checkpoint["state_dict"][name] = table
    del checkpoint["state_dict"]["backbone.decoder.norm.weight"]
    torch.save(checkpoint, other / "checkpoints" / "last.ckpt")
    assert fails(
        ["prune", str(other), "--keep", "2"], tmp_path / "out", "backbone.decoder.norm.weight of shape (16,) is"
    )


def test_models_of_another_tokenizer_are_not_mixed(runs: Path, tmp_path: Path) -> None:
    """The same settings and sizes; the text had changed when the second was trained, as its checkpoint says."""
    other = tmp_path / "other"
    shutil.copytree(runs / "two", other)
    shutil.rmtree(other / "tokenizer")
    checkpoint = torch.load(other / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["MultitaskData"]["settings"]["tokenizer"] = "0123456789abcdef"
    torch.save(checkpoint, other / "checkpoints" / "last.ckpt")
    arguments = ["aggregate", str(runs / "one"), str(other)]
    assert fails(arguments, tmp_path / "out", "got 0123456789abcdef and")


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
    assert Run.load(out).config.model.num_experts == 3
    assert not list(tmp_path.glob(".out*"))


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in SURGERY:
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0
        assert "examples:" in capsys.readouterr().out
    assert main(["prune", "somewhere", "--keep", "half", "--out", "x"]) == 2
    assert "a number of experts (4), or a share of them" in capsys.readouterr().err
