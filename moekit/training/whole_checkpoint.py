"""A sharded checkpoint as plain Lightning has it: one dictionary, in one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moekit.atomic import replacing
from moekit.errors import UserError
from moekit.parallel.checkpoint import read_extra
from moekit.parallel.checkpoint.checkpointer import read_state
from moekit.parallel.checkpoint.index import read_index
from moekit.parallel.checkpoint.reader import tensors_of
from moekit.parallel.checkpoint.state import optimizer_state_from

PathLike = str | os.PathLike[str]


def consolidate_checkpoint(folder: PathLike, path: PathLike) -> None:
    """Turn a checkpoint of `ExpertParallelStrategy` into one file of plain Lightning, in one process, without a model.

    Everything is in it: weights, optimizers, schedules, loops, callbacks, hyperparameters. ``load_from_checkpoint`` and
    ``Trainer(...).fit(ckpt_path=...)`` without the strategy take it. `moekit.parallel.consolidate` writes the weights
    alone.

    Args:
        folder: the checkpoint.
        path: the file.

    Raises:
        UserError: if the checkpoint is incomplete, cut short or altered, is not one of a Trainer, or the file cannot
            be written.
    """
    checkpoint = whole_checkpoint(folder)
    with replacing(Path(path)) as file:
        torch.save(checkpoint, file)


def whole_checkpoint(folder: PathLike) -> dict[str, Any]:
    """A checkpoint of `ExpertParallelStrategy` as the dictionary that plain Lightning writes, in host memory.

    Raises:
        UserError: as `consolidate_checkpoint`.
    """
    place = Path(os.path.abspath(folder))
    index = read_index(place)
    state, rest = read_state(place, index), rest_of(place)
    if "pytorch-lightning_version" not in rest:
        raise UserError(f"{place} must be a checkpoint of a Trainer: it is one of moekit.parallel.Checkpointer alone.")
    # One of averaged weights, of an older moekit, keeps those of the model under another name.
    found = {**rest, read_extra(place)["model_key"]: weights_of(place)}
    if "lr_schedulers" not in rest:
        return found
    optimizers = []
    for number, saved in enumerate(state["optimizers"]):
        prefix = f"optimizer/{number}/"
        names = {name: name.removeprefix(prefix) for name in index.entries if name.startswith(prefix)}
        optimizers.append(optimizer_state_from(saved, dict(tensors_of(place, index, names))))
    return {**found, "optimizer_states": optimizers}


def weights_of(folder: Path) -> dict[str, Any]:
    """The state dict of a sharded checkpoint's model: shared tensors under each of their names, and what is no tensor.

    Raises:
        UserError: if the checkpoint is missing, incomplete, cut short or altered.
    """
    index = read_index(folder)
    state = read_state(folder, index)
    names = {name: name.removeprefix("model/") for name in index.entries if name.startswith("model/")}
    found: dict[str, Any] = dict(tensors_of(folder, index, names))
    found |= {name: found[first] for name, first in state["shared"].items() if first in found}
    return found | state["model"]


def rest_of(folder: Path) -> Mapping[str, Any]:
    """What a sharded checkpoint of a Trainer holds beside weights and optimizers; empty if it is of no Trainer.

    Raises:
        UserError: as `weights_of`.
    """
    extra = read_extra(folder)
    found: Mapping[str, Any] = extra.get("checkpoint", {}) if isinstance(extra, Mapping) else {}
    return found
