"""One way to read weights and optimizer state, whatever kind of checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moekit.errors import UserError
from moekit.mapped import read_safetensors
from moekit.parallel.checkpoint import is_checkpoint
from moekit.parallel.checkpoint.checkpointer import PathLike
from moekit.parallel.checkpoint.reader import StoredCheckpoint
from moekit.training.checkpoint_io import load_checkpoint
from moekit.training.whole_checkpoint import rest_of


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint holds.

    Attributes:
        path: The file or folder that was read.
        weights: The model's state dict.
        optimizer: The state dict of its first optimizer by parameter numbers, as Lightning's checkpoints have it, or
            None.
        named_optimizer: The state of its first optimizer by parameter names, as sharded checkpoints have it, or None.
        rest: Everything else: loops, callbacks, the configuration.
    """

    path: Path
    weights: dict[str, Tensor]
    optimizer: Mapping[str, Any] | None = None
    named_optimizer: dict[str, dict[str, Any]] | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)


def load_state(path: PathLike) -> LoadedState:
    """Read a checkpoint to the CPU: of Lightning, sharded (a folder), a safetensors file, or a plain state dict.

    Tensors of files are mapped into memory and read when they are used. Nothing in a checkpoint is executed.

    Raises:
        UserError: If the file is missing or broken (a missing shard too), or holds no weights.
    """
    place = Path(path)
    if is_checkpoint(place):
        return _sharded(place)
    if place.is_dir():
        raise UserError(f"{place} must be a checkpoint: it is a folder without an index of shards.")
    if place.suffix == ".safetensors":
        return LoadedState(
            place, {name: stored.tensor() for name, stored in read_safetensors(place, float8=True).items()}
        )
    checkpoint = load_checkpoint(place, mmap=True)
    if "state_dict" not in checkpoint:
        return LoadedState(place, _tensors(checkpoint, place))
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    optimizers = checkpoint.get("optimizer_states") or [None]
    return LoadedState(place, _tensors(checkpoint["state_dict"], place), optimizer=optimizers[0], rest=rest)


def _sharded(folder: Path) -> LoadedState:
    stored = StoredCheckpoint(folder)
    weights = {name: value for name, value in stored.weights().items() if isinstance(value, Tensor)}
    slots: dict[str, dict[str, Any]] = {}
    for name, tensor in stored.tensors("optimizer/0/").items():
        parameter, slot = name.split("/")
        slots.setdefault(parameter, {})[slot] = tensor
    return LoadedState(folder, weights, named_optimizer=slots or None, rest=rest_of(stored))


def load_rest(path: PathLike) -> Mapping[str, Any]:
    """What a checkpoint of Lightning or of `ExpertParallelStrategy` holds beside weights and optimizer.

    Raises:
        UserError: If the checkpoint is missing or broken.
    """
    place = Path(path)
    if is_checkpoint(place):
        return rest_of(StoredCheckpoint(place))
    checkpoint = load_checkpoint(place, mmap=True)
    return {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"the checkpoint {path} must hold a state dict of tensors: it has none.")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"the checkpoint {path} must hold a state dict of tensors: {name!r} is of type {type(value).__name__}."
            )
    return {str(name): value for name, value in state.items()}
