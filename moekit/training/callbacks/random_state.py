"""Random numbers that a stop and a resume do not change."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback


class RandomState(Callback):
    """Gives training batches one stream of random numbers, and keeps its place in checkpoints.

    The generators of Python, NumPy and torch (the CPU's and the training device's) are remembered at the end of each
    training batch and set back at the start of the next. So whatever draws in between (a validation, the making of
    data loaders, a stop and a resume) does not change dropout, jitter or random routing: a resumed run equals one
    that was never stopped, step for step. The state is tensors and plain data, readable with ``weights_only=True``.

    Each process keeps its own state. Resumed with another number of processes, the new ones get seeds derived from
    the first one's state, and equality holds no longer.

    Batches must not depend on these generators: moekit's data order is a function of (seed, step, rank).
    """

    def __init__(self) -> None:
        self._held: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._held is not None:
            _restore(self._held, trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._held = _capture(trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        """The state of every process, in the order of ranks."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            states: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(states, self._held)
        else:
            states = [self._held]
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["processes"]
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        if rank < len(states):
            self._held = states[rank]
        elif states[0] is not None:
            seed = int(states[0]["torch"].to(torch.int64).sum()) + rank
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            self._held = _capture(torch.device("cpu"))


def _capture(device: torch.device) -> dict[str, Any]:
    """The state of all generators as plain data."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors | {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }


def _restore(state: Mapping[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
