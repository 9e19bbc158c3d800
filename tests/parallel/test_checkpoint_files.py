"""Checkpoint folders in one process: whole or not there, data and not code, and refused by name when they are not."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.layer import MoELayer
from moekit.parallel import (
    Checkpointer,
    consolidate,
    export_safetensors,
    import_safetensors,
    is_checkpoint,
    remove_checkpoint,
    verify_checkpoint,
)
from moekit.parallel.checkpoint import disk, index, writer
from moekit.routers import switch
from moekit.testing import run_distributed


class Net(nn.Module):
    """Experts, a norm with buffers, a shared table, a scalar, a bf16 weight, something that is saved and no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.moe = MoELayer(switch(8, 4, capacity_factor=None, jitter=0.0), GroupedMLP(4, 8, 16))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.low = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        self.calls = {"number": 0}

    def forward(self, ids: Tensor) -> Tensor:
        self.calls["number"] += 1
        hidden = self.norm(self.moe(self.table(ids)).hidden * self.low) * self.scale
        return self.head(hidden)

    def get_extra_state(self) -> Any:
        return self.calls

    def set_extra_state(self, state: Any) -> None:
        self.calls = state


def trained(steps: int = 2, seed: int = 0, optimizer: str = "adamw") -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net()
    weights, scalars = [p for p in net.parameters() if p.ndim], [net.scale]
    groups = [{"params": weights, "lr": 1e-2}, {"params": scalars, "lr": 1e-3, "weight_decay": 0.0}]
    made: torch.optim.Optimizer
    match optimizer:
        case "adamw":
            made = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        case "sgd":
            made = torch.optim.SGD(groups, momentum=0.9)
        case "adafactor":
            made = torch.optim.Adafactor(groups)
        case _:
            made = torch.optim.AdamW(groups, amsgrad=True)
    run(net, made, steps)
    return net, made


def run(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        ids = torch.arange(24).remainder(12).roll(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(ids).float(), ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "amsgrad"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip(optimizer: str, asynchronous: bool, tmp_path: Path) -> None:
    net, made = trained(optimizer=optimizer)
    made.param_groups[0]["lr"] = 5e-3
    extra = {"step": 2, "names": ["a", ("b", 3)], "state": torch.arange(3), "more": OrderedDict(a=None)}
    checkpointer = Checkpointer(asynchronous=asynchronous)
    checkpointer.save(tmp_path / "last", net, [made], extra=extra)
    expected = run(net, made, 3)  # while it is written, perhaps
    checkpointer.wait()

    other, fresh = trained(1, seed=3, optimizer=optimizer)
    found = Checkpointer().load(tmp_path / "last", other, [fresh])
    assert found.pop("state").tolist() == [0, 1, 2]
    assert found == {key: value for key, value in extra.items() if key != "state"}
    assert other.calls == {"number": 2}
    assert other.head.weight is other.table.weight
    assert other.low.dtype == torch.bfloat16
    assert fresh.param_groups[0]["lr"] == 5e-3
    assert run(other, fresh, 3) == expected
    assert (tmp_path / "last" / "index.json").stat().st_size < 20_000


def test_a_model_alone(tmp_path: Path) -> None:
    net, made = trained()
    Checkpointer().save(tmp_path / "last", net, [made])
    other, _ = trained(1, seed=3)
    assert Checkpointer().load(tmp_path / "last", other) is None
    assert torch.equal(other.moe.experts.w_in, net.moe.experts.w_in)
    assert torch.equal(other.norm.running_mean, net.norm.running_mean)  # type: ignore[arg-type]
    assert int(other.norm.num_batches_tracked or 0) == 2


def test_names_do_not_depend_on_wrappers(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net, made = trained()
    plain, _ = trained(1, seed=3)
    net.moe = checkpoint_wrapper(net.moe)
    Checkpointer().save(tmp_path / "last", net, [made])
    Checkpointer().load(tmp_path / "last", plain)
    assert torch.equal(plain.moe.experts.w_out, net.moe.experts.w_out)


# -- atomic ---------------------------------------------------------------------------------------------------------


def test_replacing_a_checkpoint(tmp_path: Path) -> None:
    net, made = trained()
    path = tmp_path / "deep" / "last"
    checkpointer = Checkpointer()
    checkpointer.save(path, net, [made], extra=1)
    run(net, made, 1)
    checkpointer.save(path, net, [made], extra=2)
    assert checkpointer.load(path, net, [made]) == 2
    assert sorted(p.name.partition("-")[0] for p in path.iterdir()) == ["data", "index.json"]
    assert [p.name for p in path.parent.iterdir()] == ["last"]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(folder: str, moment: str, there: bool) -> None:
    """Killed at one moment of a save, which is named by what it would do next."""
    net, made = trained()
    path = Path(folder) / "last"
    if there:
        Checkpointer().save(path, net, [made], extra="old")
    match moment:
        case "write":
            writer.save_file = die  # type: ignore[assignment]
        case "flush":
            writer.flush = die  # type: ignore[assignment]
        case "rename":
            disk.os = _Os(rename=die)  # type: ignore[assignment]
        case "replace":
            disk.os = _Os(replace=die)  # type: ignore[assignment]
        case "remove":
            disk.shutil = _Os(rmtree=die)  # type: ignore[assignment]
    Checkpointer().save(path, net, [made], extra="new")
    if moment == "nothing":
        die()


class _Os:
    """The modules `os` and `shutil` with some functions changed."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self._changed = functions

    def __getattr__(self, name: str) -> Any:
        return self._changed.get(name, getattr(os, name, None))


@pytest.mark.parametrize(
    ("moment", "there", "left"),
    [
        ("write", True, "old"),
        ("rename", False, None),
        ("replace", True, "old"),
        ("remove", True, "new"),
        pytest.param("write", False, None, marks=pytest.mark.slow),
        pytest.param("flush", True, "old", marks=pytest.mark.slow),
        pytest.param("rename", True, "old", marks=pytest.mark.slow),
        pytest.param("nothing", False, "new", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment(moment: str, there: bool, left: str | None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_distributed(save_and_die, 1, str(tmp_path), moment, there)
    path = tmp_path / "last"
    assert is_checkpoint(path) == (left is not None)
    net, made = trained(1, seed=3)
    if left is None:
        assert not path.exists()
    else:
        verify_checkpoint(path)
        assert Checkpointer().load(path, net, [made]) == left
    Checkpointer().save(path, net, [made], extra="next")
    assert [p.name for p in tmp_path.iterdir()] == ["last"]
    assert Checkpointer().load(path, net, [made]) == "next"
    assert len(list(path.glob("data-*"))) == 1


def test_removing(tmp_path: Path) -> None:
    net, _ = trained()
    Checkpointer().save(tmp_path / "last", net)
    Checkpointer().save(tmp_path / "last-v1", net)
    (tmp_path / ".last.0123abcd.tmp").mkdir()
    remove_checkpoint(tmp_path / "last")
    remove_checkpoint(tmp_path / "last")
    assert [p.name for p in tmp_path.iterdir()] == ["last-v1"]


def test_asynchronous_failure_is_told_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = trained()
    started, go_on = threading.Event(), threading.Event()

    def slow_and_broken(*_: Any, **__: Any) -> None:
        started.set()
        go_on.wait(10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", slow_and_broken)
    checkpointer = Checkpointer(asynchronous=True)
    checkpointer.save(tmp_path / "last", net)
    assert started.wait(10)  # save has returned while the file is being written
    go_on.set()
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*last: No space left on device"):
        checkpointer.save(tmp_path / "next", net)
    checkpointer.wait()  # told once
    assert not is_checkpoint(tmp_path / "last")


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "last").touch()
    net, _ = trained()
    with pytest.raises(UserError, match="a file is in the place of the checkpoint folder"):
        Checkpointer().save(tmp_path / "last", net)


# -- refused --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net, made = trained()
    Checkpointer().save(tmp_path / "last", net, [made], extra={"step": 2})
    return tmp_path / "last"


def load(path: Path) -> None:
    net, made = trained(1, seed=3)
    Checkpointer().load(path, net, [made])


def shard(path: Path) -> Path:
    return next(path.glob("data-*/rank_00000.safetensors"))


def rewrite_index(path: Path, change: Callable[[Any], None], *, honest: bool = True) -> None:
    """Change the index; an attacker, or another program, may also make its digest fit."""
    file = path / "index.json"
    raw = json.loads(file.read_text())
    change(raw)
    if honest:
        raw.pop("digest")
        raw["digest"] = index._digest(raw)
    file.write_text(json.dumps(raw))


def test_truncated_shards_are_refused_by_name(saved: Path) -> None:
    content = shard(saved).read_bytes()
    for length in (len(content) - 1, len(content) // 2, 4, 0):
        shard(saved).write_bytes(content[:length])
        for call in (load, verify_checkpoint, lambda path: consolidate(path, path / "x.safetensors")):
            with pytest.raises(UserError, match=r"rank_00000\.safetensors cannot be read .* cut short or broken"):
                call(saved)
    shard(saved).unlink()
    with pytest.raises(UserError, match=r"rank_00000\.safetensors is missing"):
        load(saved)


def test_tampered_shards_are_refused_by_name(saved: Path) -> None:
    tensors = load_file(shard(saved))
    for key in ("model/moe.experts.w_in@0,0,0", "optimizer/0/moe.experts.w_in/exp_avg@0,0,0"):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed[key].view(-1)[5] += 1e-3
        save_file(changed, shard(saved))
        for call in (load, verify_checkpoint):
            with pytest.raises(UserError, match=rf"rank_00000\.safetensors was altered .*{key.partition('@')[0]}"):
                call(saved)
    del changed[key]
    save_file(changed, shard(saved))
    with pytest.raises(UserError, match=r"rank_00000\.safetensors cannot be read at optimizer/0/moe"):
        load(saved)
    # The other way round: as many bytes under the name of another tensor.
    swapped = dict(tensors)
    swapped[key], swapped[key.replace("avg@", "avg_sq@")] = tensors[key.replace("avg@", "avg_sq@")], tensors[key]
    save_file(swapped, shard(saved))
    with pytest.raises(UserError, match="was altered"):
        load(saved)


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_no_pickle_is_executed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    plain = next(saved.glob("data-*/plain.pt"))
    before = plain.read_bytes()
    malicious = [pickle.dumps(Payload())]
    torch.save({"state": {}, "extra": Payload()}, plain)
    malicious.append(plain.read_bytes())
    for content in malicious:
        plain.write_bytes(content)
        with pytest.raises(UserError, match=r"plain\.pt was altered"):
            load(saved)

        # Even where the digests were made to fit.
        def fit(raw: Any, content: bytes = content) -> None:
            import hashlib

            raw["plain"][1] = hashlib.sha256(content).hexdigest()

        rewrite_index(saved, fit)
        with pytest.raises(UserError, match=r"tensors and plain data only: .*Nothing in it has been executed"):
            load(saved)
    assert not Path("executed").exists()

    # A folder of torch's own format: its metadata is a pickle, which is not looked at.
    other = saved.parent / "other"
    other.mkdir()
    (other / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"\.metadata file, a pickle of torch's own format, which is not read"):
        load(other)
    assert not Path("executed").exists()
    pickle.loads(pickle.dumps(Payload()))  # the payload works
    assert Path("executed").exists()
    assert before


def test_the_index_is_checked(saved: Path) -> None:
    good = (saved / "index.json").read_text()
    bank = "model/moe.experts.w_in"

    def expect(change: Callable[[Any], None], message: str, *, honest: bool = True) -> None:
        (saved / "index.json").write_text(good)
        rewrite_index(saved, change, honest=honest)
        with pytest.raises(UserError, match=message):
            load(saved)

    def halve(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][1][0] = 2

    def double(raw: Any) -> None:
        chunks = raw["tensors"][bank]["chunks"]
        chunks.append(copy.deepcopy(chunks[0]))

    def overlap(raw: Any) -> None:
        chunks = raw["tensors"][bank]["chunks"]
        first, second, third = (copy.deepcopy(chunks[0]) for _ in range(3))
        first[1][0] = 2
        second[0][0], second[1][0], second[3] = 1, 2, "other"
        third[0][0], third[1][0], third[3] = 3, 1, "third"
        raw["tensors"][bank]["chunks"] = [first, second, third]

    def outside(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][0][0] = 1

    def elsewhere(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][2] = "../secret.safetensors"

    def absolute(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][2] = "/etc/passwd"

    def flat(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][0] = [0]

    def negative(raw: Any) -> None:
        raw["tensors"][bank]["shape"][0] = -4

    def typed(raw: Any) -> None:
        raw["tensors"][bank]["dtype"] = "torch.complex64"

    def none(raw: Any) -> None:
        raw["tensors"] = None

    expect(lambda raw: raw["tensors"].pop(bank), "was altered after it was written: its digest", honest=False)
    expect(halve, r"not complete: of model/moe\.experts\.w_in.*256 of 512 numbers; nothing at 2, 3 of its first")
    expect(lambda raw: raw["tensors"][bank]["chunks"].clear(), r"0 of 512 numbers; nothing at 0, 1, 2, 3 of")
    expect(double, r"gives the same bytes, model/moe\.experts\.w_in@0,0,0 .* one of them is missing")
    expect(overlap, r"holds parts of model/moe\.experts\.w_in twice, at \(1, 0, 0\) and at \(0, 0, 0\)")
    expect(outside, r"lies outside of its shape \(4, 8, 16\)")
    for change in (elsewhere, absolute, flat, negative, typed, none):
        expect(change, r"index\.json is not a checkpoint's index")
    expect(lambda raw: raw.update(format=2), r"must have format 1: got 2")

    (saved / "index.json").write_text("[1]")
    with pytest.raises(UserError, match="must have format 1: got 'list'"):
        load(saved)
    (saved / "index.json").write_text(good[:-30])
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        load(saved)
    (saved / "index.json").write_text(good)
    load(saved)


def test_other_models_and_optimizers(saved: Path) -> None:
    net, made = trained()
    with pytest.raises(
        UserError, match=r"of another model: it has no 0\.bias, 0\.weight, and the model has no .* more"
    ):
        Checkpointer().load(saved, nn.Sequential(nn.Linear(2, 2)))
    net.moe.experts.w_in = nn.Parameter(torch.zeros(8, 8, 16))
    with pytest.raises(UserError, match=r"moe\.experts\.w_in has shape \(4, 8, 16\) there and \(8, 8, 16\) here"):
        Checkpointer().load(saved, net)
    net, made = trained()
    with pytest.raises(UserError, match="state of 2 optimizers: it has that of 1"):
        Checkpointer().load(saved, net, [made, made])
    with pytest.raises(
        UserError, match=r"groups the parameters of optimizer 0 otherwise: 2 groups of 7, 1 there, 1 groups of 8"
    ):
        Checkpointer().load(saved, net, [torch.optim.SGD(net.parameters())])
    with pytest.raises(ValueError, match="must work on the model's parameters: got one of shape \\(2, 2\\)"):
        Checkpointer().save(saved, net, [torch.optim.SGD(nn.Linear(2, 2).parameters())])
    with pytest.raises(TypeError, match=r"must be numbers, strings, tensors, and lists .*a Path to a string"):
        Checkpointer().save(saved, net, extra={"folder": Path("x")})
    with pytest.raises(UserError, match="There is no checkpoint at"):
        load(saved / "nothing")
    (saved.parent / "empty").mkdir()
    with pytest.raises(UserError, match=r"There is no index\.json, so no checkpoint, in"):
        load(saved.parent / "empty")


# -- one file -------------------------------------------------------------------------------------------------------


def test_single_file(saved: Path) -> None:
    net, _ = trained()
    first, second = saved.parent / "a" / "model.safetensors", saved.parent / "b.safetensors"
    export_safetensors(net, first)
    consolidate(saved, second)
    a, b = load_file(first), load_file(second)
    assert set(a) == set(b) == {name for name in net.state_dict() if name not in ("head.weight", "_extra_state")}
    assert all(torch.equal(a[name], b[name]) for name in a)
    other, _ = trained(1, seed=3)
    import_safetensors(first, other)
    for name, value in net.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(other.state_dict()[name], value), name

    with pytest.raises(UserError, match="There is no file"):
        import_safetensors(saved.parent / "no.safetensors", other)
    first.write_bytes(first.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .* cut short"):
        import_safetensors(first, other)
    with pytest.raises(UserError, match="of another model"):
        import_safetensors(second, nn.Linear(2, 2))
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        export_safetensors(net, second / "inside")
    assert sorted(p.name for p in saved.parent.iterdir()) == ["a", "b.safetensors", "last"]
