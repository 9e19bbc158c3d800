"""How many tokens every expert got in training, over stops and resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from moekit.folders.module import FolderModule
from moekit.layer import moe_layers
from moekit.training.agreement import everybody


class ExpertTokens(Callback):
    """Counts the kept assignments of every expert of every sparse layer in training batches.

    Counts are on the device of the routings, and are read when a checkpoint is written, and at the end.

    Attributes:
        at_end: the counts when training ended, of all processes together.
    """

    def __init__(self) -> None:
        self._before: dict[str, list[int]] = {}  # a resume, all processes together
        self._counts: dict[str, Tensor] = {}
        self._trainer: L.Trainer | None = None
        self._paths: list[str] = []
        self.at_end: dict[str, list[int]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: D102
        self._trainer = trainer

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        assert isinstance(pl_module, FolderModule)
        self._paths = [path for path, _ in moe_layers(pl_module.model)]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        assert isinstance(pl_module, FolderModule)
        for path, routing in zip(self._paths, pl_module.heard, strict=True):
            if path not in self._counts:
                self._counts[path] = torch.zeros(routing.num_experts, dtype=torch.int64, device=routing.expert.device)
            self._counts[path].index_add_(0, routing.expert, routing.kept.long())
        pl_module.heard = []  # or the graph of this batch would live on

    def counts(self) -> dict[str, list[int]]:
        """Tokens by expert, by layer, of all processes together; all of them call it."""
        assert self._trainer is not None
        mine = {path: counts.tolist() for path, counts in self._counts.items()}
        return _sum([self._before, *everybody(self._trainer, mine)])

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"counts": self.counts()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._before, self._counts = dict(state_dict["counts"]), {}
        self.at_end = self._before  # where there is nothing left to train

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        self.at_end = self.counts()

    @property
    def idle_at_end(self) -> list[str]:
        """What is to be said of experts that got no token, a layer each."""
        found = []
        for path, counts in self.at_end.items():
            numbers = [str(expert) for expert, count in enumerate(counts) if not count]
            if numbers:
                found.append(f"{path}: expert{'s' * (len(numbers) > 1)} {', '.join(numbers)} got no token in training")
        return found


def _sum(parts: list[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for part in parts:
        for path, counts in part.items():
            total[path] = [a + b for a, b in zip(total.get(path, [0] * len(counts)), counts, strict=True)]
    return total
