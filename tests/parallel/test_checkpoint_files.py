"""Checkpoint folders in one process: what is written is what is read, whole or not there, and in one file."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_net import run, trained
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.parallel import (
    Checkpointer,
    consolidate,
    export_safetensors,
    gather_state_dict,
    import_safetensors,
    is_checkpoint,
    remove_checkpoint,
    verify_checkpoint,
)
from moekit.parallel.checkpoint import disk, writer
from moekit.testing import run_distributed


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
    with pytest.raises(UserError, match=r"cannot write last in the folder .*: the disk is full"):
        checkpointer.save(tmp_path / "next", net)
    checkpointer.wait()  # told once
    assert not is_checkpoint(tmp_path / "last")


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "last").touch()
    net, _ = trained()
    with pytest.raises(UserError, match="a file is in the place of the checkpoint folder"):
        Checkpointer().save(tmp_path / "last", net)
    torch.save({"weight": torch.ones(2)}, tmp_path / "last")  # as plain Lightning does
    Checkpointer().save(tmp_path / "last", net, extra=1)
    assert Checkpointer().load(tmp_path / "last", net) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_an_index_says_what_it_is(saved: Path) -> None:
    """Whoever is told that a checkpoint is a directory looks into it."""
    assert "consolidate_checkpoint(folder, file)" in json.loads((saved / "index.json").read_text())["about"]


class Shared(nn.Module):
    """One table and one mask under two names each, and a slice of a tensor that is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight
        self.first, self.second = nn.Module(), nn.Module()
        mask = torch.arange(4.0)
        self.first.register_buffer("mask", mask)
        self.second.register_buffer("mask", mask)
        self.register_buffer("part", torch.arange(10.0)[:3])


def test_shared_tensors(tmp_path: Path) -> None:
    """Saved once, and in files under each of their names; edited copies are saved apart."""
    torch.manual_seed(1)
    model, other = Shared(), Shared()
    Checkpointer().save(tmp_path / "last", model)
    entries = json.loads((tmp_path / "last" / "index.json").read_text())["tensors"]
    assert sorted(entries) == ["model/first.mask", "model/part", "model/table.weight"]
    Checkpointer().load(tmp_path / "last", other)
    assert torch.equal(other.head.weight, model.head.weight)
    assert other.head.weight is other.table.weight
    consolidate(tmp_path / "last", tmp_path / "a.safetensors")
    export_safetensors(model, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        state = load_file(tmp_path / f"{name}.safetensors")
        plain = Shared()
        plain.load_state_dict(state)
        assert torch.equal(plain.table.weight, model.table.weight)
        import_safetensors(tmp_path / f"{name}.safetensors", Shared())
    apart = {**model.state_dict(), "head.weight": model.table.weight.detach() + 1}
    Checkpointer().save(tmp_path / "apart", model, state=apart)
    assert torch.equal(Checkpointer().read(tmp_path / "apart", model).state["head.weight"], apart["head.weight"])
    with pytest.raises(UserError, match=r"has table\.weight and head\.weight apart, which are one tensor here"):
        Checkpointer().load(tmp_path / "apart", model)


def test_a_whole_state_dict() -> None:
    net, _ = trained()
    found = gather_state_dict(net)
    assert found.keys() == net.state_dict().keys()
    with torch.no_grad():
        net.scale.add_(1)
    assert float(net.scale.detach() - found["scale"]) == pytest.approx(1.0)  # which is a copy


# -- one file -------------------------------------------------------------------------------------------------------


def test_single_file(saved: Path) -> None:
    net, _ = trained()
    first, second = saved.parent / "a" / "model.safetensors", saved.parent / "b.safetensors"
    export_safetensors(net, first)
    consolidate(saved, second)
    a, b = load_file(first), load_file(second)
    assert set(a) == set(b) == {name for name in net.state_dict() if name != "_extra_state"}
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(a["head.weight"], a["table.weight"])
    plain, _ = trained(1, seed=3)
    assert plain.load_state_dict(b, strict=False).missing_keys == ["_extra_state"]  # a file of tensors has none
    assert torch.equal(plain.head.weight, net.head.weight)
    other, _ = trained(1, seed=3)
    import_safetensors(first, other)
    for name, value in net.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(other.state_dict()[name], value), name

    with pytest.raises(UserError, match="there is no file"):
        import_safetensors(saved.parent / "no.safetensors", other)
    first.write_bytes(first.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors must be a whole safetensors file"):
        import_safetensors(first, other)
    with pytest.raises(UserError, match="of another model"):
        import_safetensors(second, nn.Linear(2, 2))
    with pytest.raises(UserError, match="cannot write inside in the folder"):
        export_safetensors(net, second / "inside")
    assert sorted(p.name for p in saved.parent.iterdir()) == ["a", "b.safetensors", "last"]
