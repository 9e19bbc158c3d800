"""Saving and loading a model with its optimizers, at any layout."""

from __future__ import annotations

import datetime
import io
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moekit.atomic import flush, writing
from moekit.errors import UserError
from moekit.mapped import read_safetensors
from moekit.parallel.checkpoint.disk import hidden_folders
from moekit.parallel.checkpoint.index import INDEX
from moekit.parallel.checkpoint.optimizer_state import flatten_optimizers, optimizer_states_from, optimizer_targets
from moekit.parallel.checkpoint.reader import StoredCheckpoint
from moekit.parallel.checkpoint.state import (
    extra_targets,
    extract_dtensors,
    insert_dtensors,
    model_targets,
    model_tensors,
    require_same_tensors,
    state_dict_from,
)
from moekit.parallel.checkpoint.writer import FolderWriter
from moekit.parallel.master_weights import swapped_in
from moekit.parallel.mesh import host_group
from moekit.stored import check_archive

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CheckpointContent:
    """What a checkpoint holds, sharded as a model is.

    Attributes:
        state: A state dict for the model.
        optimizers: A state dict for each optimizer.
        extra: What was saved beside model and optimizers.
    """

    state: dict[str, Any]
    optimizers: list[dict[str, Any]]
    extra: Any


class Checkpointer:
    """Saves and loads sharded checkpoints; with `asynchronous`, training goes on while files are written.

    A checkpoint is a folder to which every process writes its own part. It can be loaded in any other layout and by
    any other number of processes, one without torch.distributed included. It appears under its name when it is whole:
    after a crash at any moment the name holds the former checkpoint, or nothing. Nothing in it is ever executed.

    All processes must call `save` and `load` together, with the same path on a file system that they share.

    Args:
        asynchronous: `save` returns when the state has been copied to host memory (which takes that much of it); the
            rest happens in a thread, with communication of its own. The next `save`, or `wait`, tells of its failure.
        timeout: Seconds after which a process that waits for others in a save gives up.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 2)
        >>> folder = tempfile.mkdtemp()
        >>> checkpointer = Checkpointer()
        >>> checkpointer.save(f"{folder}/last", model, extra={"step": 3})
        >>> checkpointer.load(f"{folder}/last", nn.Linear(2, 2))
        {'step': 3}
    """

    def __init__(self, *, asynchronous: bool = False, timeout: float = 1800.0) -> None:
        self.asynchronous, self.timeout = asynchronous, timeout
        self._saving: futures.Future[None] | None = None

    def save(
        self,
        path: PathLike,
        model: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        *,
        extra: Any = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Save to the folder `path`; a checkpoint that is there is replaced when the new one is whole.

        Args:
            path: The folder, on a file system that all processes share.
            model: The model, parallelized or plain.
            optimizers: The optimizers of the model, with or without master weights.
            extra: Plain data (numbers, strings, tensors, and lists and dictionaries of them); that of rank 0 is saved,
                and DTensors in it by all ranks.
            state: What to save as the model's state dict, with or without entries that the model has; None = as it is.

        Raises:
            UserError: If the disk is full and the like, on all ranks.
            TypeError: If `extra` is more than plain data.
            RuntimeError: If a process failed or vanished, also if the one before failed in its thread.
        """
        self.wait()
        tensors, other, shared = model_tensors(model, state)
        statistics, plain = flatten_optimizers(model, optimizers)
        tensors = {f"model/{name}": tensor.detach() for name, tensor in tensors.items()} | statistics
        extra = extract_dtensors(extra, tensors, "extra")
        place = Path(os.path.abspath(path))
        data = _dump({"state": {"model": other, "shared": shared, "optimizers": plain}, "extra": extra})
        group = self._own_group()
        _check_repeated(tensors, model, group)
        # What all ranks repeat as plain tensors is rank 0's, and need not be equal (buffers).
        tensors = {name: t for name, t in tensors.items() if isinstance(t, DTensor) or _rank() == 0}
        writer = FolderWriter(place, data)
        if not self.asynchronous:
            _write(tensors, writer, group)
            return
        # In host memory, and independent of what training does next.
        tensors = {name: t.clone() if t.device.type == "cpu" else t.cpu() for name, t in tensors.items()}
        executor = futures.ThreadPoolExecutor(1, f"checkpoint {place.name}")
        self._saving = executor.submit(_write, tensors, writer, group)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Wait for a save in a thread.

        Raises:
            UserError | RuntimeError: If it failed.
        """
        saving = self._saving
        if saving is not None:
            futures.wait([saving])  # also again, if this is interrupted
            self._saving = None
            saving.result()

    def load(self, path: PathLike, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> Any:
        """Load the checkpoint at `path` into the model and its optimizers; return what was saved as `extra`.

        The model is of the shape that was saved, parallelized in any way or plain; the optimizers are those that were
        saved, or none to load the model alone.

        Raises:
            UserError: Naming the file, if the checkpoint is missing, incomplete, cut short or altered; naming the
                tensor, if it is of another model. Model and optimizers are as they were then.
        """
        found = self.read(path, model, optimizers, strict=True)
        model.load_state_dict(found.state, strict=False)  # `read` has compared the names of all tensors
        with swapped_in(*optimizers):
            for optimizer, state in zip(optimizers, found.optimizers, strict=True):
                optimizer.load_state_dict(state)
        return found.extra

    def read(
        self,
        path: PathLike,
        model: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        *,
        strict: bool = False,
        others: bool = False,
    ) -> CheckpointContent:
        """What `load` would load, without touching the model: each rank reads its own parts.

        It takes as much memory as the weights, beside them; a training step's gradients take as much. If it is
        `strict`, names and shapes must be the model's. With `others`, tensors that the model has not, or not in this
        shape, are read too: whole, on each rank's CPU; parameters of the optimizers may then have got other names.

        Raises:
            UserError: If `load` would raise it.
        """
        self.wait()
        stored = StoredCheckpoint(path)
        index, plain, where = stored.index, stored.state, str(stored.folder)
        if strict:
            require_same_tensors(model, index, plain, where)
        targets: dict[str, Tensor] = model_targets(model, index, others=others)
        if optimizers:
            with swapped_in(*optimizers):
                targets |= optimizer_targets(model, optimizers, index, plain, where, renamed=others)
        targets |= extra_targets(model, index)
        read_into(targets, stored)
        # What is not read has a shape, so that it can be refused by name.
        unread = {f"model/{name}": entry.empty("meta") for name, entry in index.under("model/").items()}
        return CheckpointContent(
            state_dict_from(model, unread | targets, plain),
            optimizer_states_from(model, optimizers, targets, plain),
            insert_dtensors(stored.plain["extra"], targets),
        )

    def _own_group(self) -> dist.ProcessGroup | None:
        """A group on CPUs for saves alone: they may run beside training's communication."""
        return host_group("checkpoint", datetime.timedelta(seconds=self.timeout)) if _distributed() else None


def read_extra(path: PathLike) -> Any:
    """What was given as `extra` when the checkpoint was saved, without a model; nothing in it is executed.

    Raises:
        UserError: Naming the file, if the checkpoint is missing, cut short or altered.
    """
    return StoredCheckpoint(path).extra


def read_into(targets: Mapping[str, Tensor], stored: StoredCheckpoint) -> None:
    """Fill tensors from a checkpoint, each rank its part; all ranks call it together.

    Raises:
        UserError: If a file is missing, cut short or altered; on all ranks.
    """
    if not _distributed():
        stored.fill(targets)
        return
    failure: Exception | None = None
    try:
        stored.fill(targets)
    except Exception as error:
        failure = _failure(_rank(), error)
    everyone: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failure)
    for first in filter(None, everyone):
        raise first


def is_checkpoint(path: PathLike) -> bool:
    """Whether there is a sharded checkpoint at `path`."""
    return (Path(path) / INDEX).is_file()


def verify_checkpoint(path: PathLike) -> None:
    """Read all of a checkpoint, a folder or a file, and compare every part with its digest; for one process.

    moekit does so itself before it uses a checkpoint. It is for what others are to read, as Lightning's
    ``load_from_checkpoint``. A safetensors file of another program has no digests, and passes.

    Raises:
        UserError: Naming the file that is missing, cut short or altered, or the tensor that is not complete.
    """
    place = Path(path)
    if place.suffix == ".safetensors":
        read_safetensors(place, float8=True)
    elif not place.is_file():
        StoredCheckpoint(path).verify()
    else:
        try:
            check_archive(place)
        except (OSError, ValueError) as error:
            raise UserError(f"{place} is broken: {error}. Use another checkpoint.") from None


def remove_checkpoint(path: PathLike) -> None:
    """Delete a checkpoint; it vanishes from its name at once, whole. For one process; none there is no error.

    Raises:
        UserError: If it cannot be deleted.
    """
    place = Path(os.path.abspath(path))
    with writing(place):
        if place.is_dir():
            os.rename(place, place.with_name(f".{place.name}.{os.urandom(4).hex()}.tmp"))
            flush(place.parent)
        for folder in hidden_folders(place):
            shutil.rmtree(folder)


def _write(tensors: dict[str, Tensor], writer: FolderWriter, group: dist.ProcessGroup | None) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    if group is not None:
        try:
            state_dict_saver.save(tensors, storage_writer=writer, planner=planner, process_group=group)
        except CheckpointException as failed:  # of some ranks; told by all in the words of the first
            rank, (error, _) = min(failed.failures.items())
            raise _failure(rank, error) from error
        return
    planner.set_up_planner(tensors, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).value()])


def _failure(rank: int, error: BaseException) -> Exception:
    """A rank's error as all ranks raise it."""
    if isinstance(error, UserError):
        return UserError(str(error))
    return RuntimeError(f"rank {rank} failed in a checkpoint ({type(error).__name__}): {error}")


def _check_repeated(tensors: dict[str, Tensor], model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Parameters that are plain tensors must be repeated on all ranks: one rank's would be saved for all.

    Raises:
        ValueError: Naming the first that differs.
    """
    if group is None or group.size() == 1:
        return
    buffers = {f"model/{name}" for name, _ in model.named_buffers()}
    plain = [n for n, t in tensors.items() if not isinstance(t, DTensor) and n not in buffers and t.numel()]
    if not plain:
        return
    sums = torch.stack([tensors[name].double().sum().cpu() for name in plain])
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, sums.tolist(), group=group)
    for rank, values in enumerate(everyone):
        for name, mine, other in zip(plain, everyone[0], values, strict=True):
            if mine != other and not (mine != mine and other != other):
                raise ValueError(
                    f"{name.partition('/')[2]} is a plain tensor and differs between ranks 0 and {rank}: a checkpoint "
                    "would keep one of them and lose the other. Parallelize the model (moekit.parallel.parallelize)."
                )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _dump(content: Any) -> bytes:
    """Plain data as bytes that `weights_only` reads back.

    Raises:
        TypeError: If it is more than that.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            "what is saved beside a model must be numbers, strings, tensors, and lists and dictionaries of them: "
            f"{next(iter(str(error).splitlines()), '')} Convert it, for example a Path to a string."
        ) from None
    return buffer.getvalue()
