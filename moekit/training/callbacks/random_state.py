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

    Each data rank keeps its own state, which tensor-parallel partners share: they draw the same dropout. Resumed with
    another number of data ranks, the new ones get seeds derived from the first one's state, and equality holds no
    longer.

    Batches must not depend on these generators: moekit's data order is a function of (seed, step, rank).
    """

    def __init__(self) -> None:
        self._held: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None  # states of all data ranks, until a batch says which one is ours
        self._data_rank = 0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        share = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        self._data_rank = share["rank"]
        if self._loaded is not None:
            states, self._loaded = self._loaded, None
            partners = trainer.world_size // share["num_replicas"]
            self._held = _state_of(self._data_rank, partners, states, trainer.strategy.root_device)
        if self._held is not None:
            _restore(self._held, trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._held = _capture(trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        """The state of every data rank, in their order."""
        if self._loaded is not None:  # saved again before the first batch
            return self._loaded
        mine = (self._data_rank, self._held)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            states: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(states, mine)
        else:
            states = [mine]
        by_rank = dict(reversed(states))  # of partners the first one's
        return {"data_ranks": [by_rank[rank] for rank in sorted(by_rank)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


def _state_of(rank: int, partners: int, saved: Mapping[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The state of a data rank, which has so many tensor-parallel partners, itself included."""
    if "data_ranks" in saved:
        states, place = saved["data_ranks"], rank
    else:  # of a former version, by process: partners take that of the first among them
        states, place = saved["processes"], rank * partners
    if place < len(states):
        return states[place]
    if states[0] is None:
        return None
    seed = int(states[0]["torch"].to(torch.int64).sum()) + rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return _capture(device)


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
