"""A sharded checkpoint as plain Lightning has it: one dictionary, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moekit.atomic import replacing
from moekit.errors import UserError
from moekit.parallel.checkpoint.checkpointer import PathLike
from moekit.parallel.checkpoint.optimizer_state import optimizer_state_from
from moekit.parallel.checkpoint.reader import StoredCheckpoint


def consolidate_checkpoint(folder: PathLike, path: PathLike) -> None:
    """Turn a checkpoint of `ExpertParallelStrategy` into one file of plain Lightning, in one process, without a model.

    Everything is in it: weights, optimizers, schedules, loops, callbacks, hyperparameters. ``load_from_checkpoint`` and
    ``Trainer(...).fit(ckpt_path=...)`` without the strategy take it. `moekit.parallel.consolidate` writes the weights
    alone. A file at `path` is replaced when the new one is whole.

    Raises:
        UserError: If the checkpoint is incomplete, cut short or altered, is not one of a Trainer, or the file cannot
            be written.
    """
    checkpoint = whole_checkpoint(folder)
    with replacing(Path(path)) as file:
        torch.save(checkpoint, file)


def whole_checkpoint(folder: PathLike) -> dict[str, Any]:
    """A checkpoint of `ExpertParallelStrategy` as the dictionary that plain Lightning writes, in host memory.

    Raises:
        UserError: If the checkpoint is incomplete, cut short or altered, or is not one of a Trainer.
    """
    stored = StoredCheckpoint(folder)
    rest = rest_of(stored)
    if "pytorch-lightning_version" not in rest:
        raise UserError(
            f"{stored.folder} must be a checkpoint of a Trainer: it is one of moekit.parallel.Checkpointer alone."
        )
    # One of averaged weights, of an older moekit, keeps those of the model under another name.
    found = {**rest, stored.extra["model_key"]: stored.weights()}
    if "lr_schedulers" not in rest:
        return found
    optimizers = [
        optimizer_state_from(saved, stored.tensors(f"optimizer/{number}/"))
        for number, saved in enumerate(stored.state["optimizers"])
    ]
    return {**found, "optimizer_states": optimizers}


def rest_of(stored: StoredCheckpoint) -> Mapping[str, Any]:
    """What a sharded checkpoint of a Trainer holds beside weights and optimizers; empty if it is of no Trainer."""
    extra = stored.extra
    found: Mapping[str, Any] = extra.get("checkpoint", {}) if isinstance(extra, Mapping) else {}
    return found
