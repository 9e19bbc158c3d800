"""Checkpoints over processes: saved at each layout, loaded at each other; processes killed in steps and in saves."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_lm import GLOBAL_BATCH, SmallLM, sentences
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.errors import UserError
from moekit.parallel import (
    Checkpointer,
    Layout,
    MasterWeights,
    build_meshes,
    consolidate,
    export_safetensors,
    import_safetensors,
    parallelize,
    verify_checkpoint,
)
from moekit.parallel.checkpoint import checkpointer as module_of_checkpointer
from moekit.parallel.checkpoint import disk, writer
from moekit.testing import run_distributed

BEFORE, AFTER = 3, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "1: plain": {},
    "1: zero 3": {"devices": 1},
    "2: expert 2": {"devices": 2, "expert_parallel_size": 2},
    "2: zero 0": {"devices": 2, "zero_stage": 0},
    "2: tensor 2": {"devices": 2, "tensor_parallel_size": 2},
    "2: zero 1": {"devices": 2, "zero_stage": 1},
    "4: expert 2": {"devices": 4, "expert_parallel_size": 2},
    "4: expert 4, zero 2": {"devices": 4, "expert_parallel_size": 4, "zero_stage": 2},
    "4: expert 2, tensor 2": {"devices": 4, "expert_parallel_size": 2, "tensor_parallel_size": 2},
    "4: expert 2, replicas 2": {"devices": 4, "expert_parallel_size": 2, "replicas": 2},
    "4: expert 2, zero 1": {"devices": 4, "expert_parallel_size": 2, "zero_stage": 1},
    "4: zero 1, optimizer offloaded": {"devices": 4, "zero_stage": 1, "offload": "optimizer"},
    "4: expert 2, parameters offloaded": {"devices": 4, "expert_parallel_size": 2, "offload": "parameters"},
}
# Every layout is saved for, and loaded from, one other, most of another number of processes; the rest is slow.
NAMES = list(LAYOUTS)
FAST = {(a, NAMES[(n + 5) % len(NAMES)]) for n, a in enumerate(NAMES)}
ALL = set(itertools.product(NAMES, NAMES))


class Run:
    """A model in a layout, its optimizer, and steps on the same global batches whatever the layout."""

    def __init__(self, name: str, *, seed: int = 0) -> None:
        self.module = SmallLM(by_tokens=True)
        if seed:
            with torch.no_grad():
                generator = torch.Generator().manual_seed(seed)
                for parameter in self.module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        options = LAYOUTS[name]
        self.rank, self.ranks = 0, 1
        if options:
            meshes = build_meshes(Layout(**options), "cpu")
            parallelize(self.module, meshes)
            self.rank, self.ranks = meshes.data_rank, meshes.data_size
        self.module.forward = self.module.loss  # weights are gathered for the root's forward
        self.optimizer = self.module.configure_optimizers()
        offload = options.get("offload") == "optimizer"
        if options.get("zero_stage") == 1 or offload:
            MasterWeights(self.optimizer, divide=True, device=torch.device("cpu") if offload else None)

    def steps(self, first: int, number: int) -> list[float]:
        losses = []
        for ids in sentences(first + number).split(GLOBAL_BATCH)[first:]:
            self.optimizer.zero_grad()
            loss = self.module(ids.chunk(self.ranks)[self.rank])
            loss.backward()
            self.optimizer.step()
            total = loss.detach().clone()
            if dist.is_initialized():
                dist.all_reduce(total)
                total /= dist.get_world_size()
            losses.append(float(total))
        return losses

    def weights(self) -> dict[str, Tensor]:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in self.module.named_parameters()
        }


def save_each(names: list[str], folder: str) -> None:
    for name in names:
        run = Run(name)
        run.steps(0, BEFORE)
        checkpointer = Checkpointer(asynchronous="expert" in name)
        checkpointer.save(f"{folder}/{name}", run.module, [run.optimizer], extra={"steps": BEFORE, "saved by": name})
        # What training does meanwhile must not reach the files.
        run.steps(BEFORE, 1)
        checkpointer.wait()


def load_each(pairs: list[tuple[str, str]], folder: str, expected: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Largest differences, of losses and of weights (relative), after the next steps."""
    found = []
    for layout in dict.fromkeys(into for _, into in pairs):
        run = Run(layout, seed=5)
        for saved in [saved for saved, into in pairs if into == layout]:
            extra = Checkpointer().load(f"{folder}/{saved}", run.module, [run.optimizer])
            assert extra == {"steps": BEFORE, "saved by": saved}
            losses = run.steps(BEFORE, AFTER)
            loss = max(abs(a - b) / b for a, b in zip(losses, expected["losses"], strict=True))
            weights = run.weights()
            weight = max(float((weights[n] - w).norm() / w.norm()) for n, w in expected["weights"].items())
            found.append((f"{saved} -> {layout}", loss, weight))
    return found


def reference() -> dict[str, Any]:
    run = Run("1: plain")
    run.steps(0, BEFORE)
    return {"losses": run.steps(BEFORE, AFTER), "weights": run.weights()}


def of_world(number: int) -> list[str]:
    return [name for name in NAMES if name.startswith(f"{number}:")]


def check_grid(pairs: set[tuple[str, str]], folder: Path) -> None:
    expected = reference()
    for world in (1, 2, 4):
        run_distributed(save_each, world, of_world(world), str(folder))
    worst: list[tuple[str, float, float]] = []
    for world in (1, 2, 4):
        mine = sorted(pair for pair in pairs if pair[1] in of_world(world))
        worst += run_distributed(load_each, world, mine, str(folder), expected, timeout=300.0)[0]
    print(f"{len(worst)} pairs of layouts; largest difference of losses {max(row[1] for row in worst):.1e}")
    assert len(worst) == len(pairs)
    for pair, loss, weight in worst:
        assert loss < 2e-6, (pair, loss)
        assert weight < 2e-6, (pair, weight)


def test_checkpoints_move_between_layouts(tmp_path: Path) -> None:
    check_grid(FAST, tmp_path)
    for name in NAMES:
        verify_checkpoint(tmp_path / name)
        # Whatever wrote it, its weights are those of one process, in one file.
        consolidate(tmp_path / name, tmp_path / "whole.safetensors")
        run = Run("1: plain", seed=5)
        import_safetensors(tmp_path / "whole.safetensors", run.module)
        losses = run.steps(BEFORE, 1)
        assert losses[0] == pytest.approx(reference()["losses"][0], rel=1e-5)


@pytest.mark.slow
def test_checkpoints_move_between_all_layouts(tmp_path: Path) -> None:
    check_grid(ALL, tmp_path)


def move_files(folder: str) -> list[Any]:
    """Single files out of and into divided models; and what goes wrong with them."""
    run = Run("2: expert 2")
    run.steps(0, BEFORE)
    export_safetensors(run.module, f"{folder}/whole.safetensors")
    dist.barrier()
    other = Run("2: tensor 2", seed=5)
    import_safetensors(f"{folder}/whole.safetensors", other.module)
    equal = all(torch.equal(a, b) for a, b in zip(run.weights().values(), other.weights().values(), strict=True))

    # DTensors among extra data are saved by all ranks and come back laid out like the model's.
    average = {name: p.detach().clone() for name, p in run.module.state_dict().items()}
    odd = DTensor.from_local(torch.ones(3), next(run.module.parameters()).device_mesh)  # type: ignore[union-attr]
    Checkpointer().save(f"{folder}/average", run.module, extra={"average": average, "list": [odd, 3]})
    back = Checkpointer().load(f"{folder}/average", other.module)
    same = [
        back["average"][name].placements == p.placements
        and bool((back["average"][name].full_tensor() - p.full_tensor()).eq(0).all())
        for name, p in other.module.named_parameters()
        if isinstance(p, DTensor)
    ]
    return [equal, len(same), all(same), back["list"][0].tolist(), back["list"][1]]


def test_single_files_and_extra_tensors(tmp_path: Path) -> None:
    for result in run_distributed(move_files, 2, str(tmp_path)):
        equal, number, same, ones, three = result
        assert equal
        assert number > 10
        assert same
        assert ones == [1.0] * 3
        assert three == 3
    run = Run("1: plain", seed=5)
    import_safetensors(tmp_path / "whole.safetensors", run.module)
    expected = Run("1: plain")
    expected.steps(0, BEFORE)
    for got, weight in zip(run.module.parameters(), expected.module.parameters(), strict=True):
        torch.testing.assert_close(got, weight, rtol=1e-4, atol=1e-5)


def damaged(folder: str) -> list[str]:
    """Every rank hears of one rank's trouble, by the file's name."""
    run = Run("2: expert 2")
    path = Path(folder) / "damaged"
    Checkpointer().save(path, run.module, [run.optimizer])
    dist.barrier()
    messages = []
    if dist.get_rank() == 0:
        file = next(path.glob("data-*/rank_00001.safetensors"))
        content = bytearray(file.read_bytes())
        content[-8] ^= 1
        file.write_bytes(content)
    dist.barrier()
    try:
        Checkpointer().load(path, run.module, [run.optimizer])
    except UserError as error:
        messages.append(str(error))
    # A parameter that parallelize has not seen is plain; two ranks' different values cannot both be saved.
    bank = nn.Linear(2, 2)
    with torch.no_grad():
        bank.weight.fill_(dist.get_rank())
    try:
        Checkpointer().save(f"{folder}/plain", bank)
    except ValueError as error:
        messages.append(str(error))
    # A failing rank fails the save on all, and the former checkpoint stays.
    with torch.no_grad():
        bank.weight.fill_(0.0), bank.bias.fill_(0.0)
    good = Checkpointer()
    good.save(f"{folder}/kept", bank, extra=1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 0:
        writer.save_file = full
    for asynchronous in (False, True):
        failing = Checkpointer(asynchronous=asynchronous)
        try:
            failing.save(f"{folder}/kept", bank, extra=2)
            failing.wait()
        except UserError as error:
            messages.append(str(error))
    messages.append(str(good.load(f"{folder}/kept", bank)))
    return messages


def test_trouble_of_one_rank_is_everybodys(tmp_path: Path) -> None:
    for messages in run_distributed(damaged, 2, str(tmp_path)):
        assert len(messages) == 5
        assert "rank_00001.safetensors was altered after it was written" in messages[0]
        assert "weight is a plain tensor and differs between ranks 0 and 1" in messages[1]
        assert "cannot write kept in the folder" in messages[2]
        assert "the disk is full" in messages[2]
        assert messages[2] == messages[3]
        assert messages[4] == "1"


# -- kill -9 --------------------------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(call: Callable[..., Any]) -> Callable[..., None]:
    """What `call` does, then the end."""

    def both(*args: Any, **kwargs: Any) -> None:
        call(*args, **kwargs)
        die()

    return both


def half_file(tensors: Any, path: Path, *_: Any, **__: Any) -> None:
    """A file cut short."""
    real_save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    die()


real_save_file = writer.save_file


def killed(folder: str, moment: str, victim: int, asynchronous: bool) -> None:
    """Train, save, train on, and lose a rank."""
    run = Run("2: expert 2")
    run.steps(0, BEFORE - 1)
    Checkpointer().save(f"{folder}/last", run.module, [run.optimizer], extra=BEFORE - 1)
    run.steps(BEFORE - 1, 1)
    Checkpointer().save(f"{folder}/last", run.module, [run.optimizer], extra=BEFORE)
    dist.barrier()
    (Path(folder) / f"{dist.get_rank()}.time").write_text(str(time.time()))
    if moment == "step":
        if dist.get_rank() == victim:
            middle = run.module.model.decoder.layers[1]
            middle.register_forward_hook(lambda layer, inputs, output: output.hidden.register_hook(die) and None)
        run.steps(BEFORE, AFTER)
        return
    run.steps(BEFORE, 1)
    if dist.get_rank() == victim:
        match moment:
            case "half a file":
                writer.save_file = half_file
            case "before the index":
                disk.os = _Os("replace", die)  # type: ignore[assignment]
            case "after the index":
                disk.os = _Os("replace", after(os.replace))  # type: ignore[assignment]
            case "planning":
                writer.FolderWriter.prepare_local_plan = die  # type: ignore[method-assign]
    checkpointer = Checkpointer(asynchronous=asynchronous)
    checkpointer.save(f"{folder}/last", run.module, [run.optimizer], extra=BEFORE + 1)
    run.steps(BEFORE + 1, 1)
    checkpointer.wait()


class _Os:
    """The module `os` with one function changed."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._changed = {name: function}

    def __getattr__(self, name: str) -> Any:
        return self._changed.get(name, getattr(os, name))


def resumed(folder: str) -> tuple[int, list[float]]:
    run = Run("2: tensor 2", seed=5)
    steps = Checkpointer().load(f"{folder}/last", run.module, [run.optimizer])
    losses = run.steps(steps, BEFORE + AFTER - steps)
    # The next save removes what the killed one has left.
    Checkpointer().save(f"{folder}/last", run.module, [run.optimizer], extra=0)
    return steps, losses


@pytest.mark.parametrize(
    ("moment", "victim", "asynchronous", "steps"),
    [
        ("step", 1, False, BEFORE),
        ("half a file", 1, False, BEFORE),
        ("before the index", 0, False, BEFORE),
        ("after the index", 0, False, BEFORE + 1),
        ("half a file", 0, True, BEFORE),
        pytest.param("planning", 1, False, BEFORE, marks=pytest.mark.slow),
        pytest.param("step", 0, False, BEFORE, marks=pytest.mark.slow),
        pytest.param("half a file", 1, True, BEFORE, marks=pytest.mark.slow),
    ],
)
def test_killed(moment: str, victim: int, asynchronous: bool, steps: int, tmp_path: Path) -> None:
    """The job ends within 20 seconds of the kill with a message, and goes on from a whole checkpoint."""
    with pytest.raises(RuntimeError, match=rf"rank {victim} of 2 failed .*exit code -9|rank {1 - victim} of 2 failed"):
        run_distributed(killed, 2, str(tmp_path), moment, victim, asynchronous)
    began = max(float((tmp_path / f"{rank}.time").read_text()) for rank in range(2))
    assert time.time() - began < 20
    verify_checkpoint(tmp_path / "last")
    found, losses = run_distributed(resumed, 2, str(tmp_path))[0]
    assert found == steps
    assert losses == pytest.approx(reference()["losses"][steps - BEFORE :], rel=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert len(list((tmp_path / "last").glob("data-*"))) == 1


def test_names_of_patched_modules() -> None:
    """The kills above hit: what they replace is what a save calls."""
    assert writer.save_file is real_save_file
    assert disk.commit is writer.commit
    assert module_of_checkpointer.FolderWriter is writer.FolderWriter
