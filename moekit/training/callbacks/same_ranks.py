"""Processes that train together must be of one mind, or they drift apart without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from moekit.errors import UserError
from moekit.training.agreement import everybody
from moekit.training.processes import let_survivors_tell


class SameOnRanks(Callback):
    """Compares facts between all processes once, before the model is divided and before the first training step.

    Args:
        facts: plain values by name: settings, versions, digests of code and data.

    Raises:
        UserError: on all processes, if any fact differs: naming it, the ranks and their values.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise UserError on all processes if facts differ."""
        if trainer.world_size == 1 or stage != "fit":
            return
        let_survivors_tell()
        first, *others = everybody(trainer, self.facts)
        lines = [
            f"\n  {name}: {first.get(name)!r} on rank 0, {facts.get(name)!r} on rank {rank}"
            for rank, facts in enumerate(others, start=1)
            for name in {**first, **facts}
            if first.get(name) != facts.get(name)
        ]
        if lines:
            raise UserError(
                f"all processes of a run must have the same settings, code and data. These differ:{''.join(lines)}\n"
                "Start them with one command, of one installation, on one corpus."
            )
