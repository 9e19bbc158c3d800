"""Watching training waits for a device at a look, and in every step only where a step may be left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import explained, gpu

import moekit as mk
from moekit.routing import Capacity
from moekit.training import TrainingWatch


@pytest.mark.parametrize("on_spike", ["warn", "skip"])
def test_waits_of_watched_steps(on_spike: Any) -> None:
    with gpu() as found:
        router = mk.routers.TopKRouter(8, 4, 2, capacity=Capacity(1.0, 1.0))
        layer = mk.MoELayer(router, mk.experts.GroupedMLP(4, 8, 16)).to("cuda")
        aux, watch = mk.AuxLosses(load_balance=0.01), TrainingWatch(layer, every=3, on_spike=on_spike)
        for step in range(1, 7):
            x = torch.ones(12, 8, device="cuda")
            with found.watch() as waits:
                hidden, routing = layer(x)
                loss = hidden.square().mean() + aux(routing)[0]
                watch.add_loss(loss)
                loss.backward()
                watch.before_step(step, torch.ones((), device="cuda"))
                watch.after_step(step)
            explained(waits)
            # At a look: what was counted, and the norms of the experts' gradients.
            assert sum(waits.values()) == (2 if step % 3 == 0 else 0) + (on_spike == "skip"), [*map(str, waits)]
        assert watch.values["routing/layer/expert_gradient_norm"] > 0
        with found.watch() as waits:
            watch.fold()  # before a checkpoint
        explained(waits)
        assert sum(waits.values()) == 1
