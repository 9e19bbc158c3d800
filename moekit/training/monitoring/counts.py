"""What sparse layers return in training, counted where they are; read, and added over processes, now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.errors import UserError
from moekit.layer import moe_layers
from moekit.routing import Routing
from moekit.routing_traces.recording import named_layers
from moekit.stepping import in_backward
from moekit.training.metrics.routing import RoutingStatistics, learns
from moekit.training.monitoring.rules import LayerFigures

NO_BALANCE = ("router_z",)
"""Losses of routers that are for something else than balance."""
_OWN = 4  # numbers of a layer beside `RoutingStatistics`: see `LayerCounts._own`


class LayerCounts:
    """Counts of every `MoELayer` of a model, from forwards in training while `hearing`.

    What activation checkpointing computes again is not counted, nor are forwards in evaluation. Nothing is kept of a
    batch but sums on its device.

    Args:
        model: any module; one without sparse layers has no counts.

    Attributes:
        layers: number of experts by layer name.
        hearing: whether forwards count for now.

    Raises:
        UserError: a device without float64, which is Apple's MPS.
    """

    def __init__(self, model: nn.Module) -> None:
        found = named_layers(model) if any(True for _ in moe_layers(model)) else {}
        self.layers = {name: layer.num_experts for name, layer in found.items()}
        self.fixed = [name for name, layer in found.items() if not learns(layer)]
        self.hearing = False
        self._names = list(found)
        self._balance: dict[str, tuple[str, ...]] = dict.fromkeys(found, ())
        self._without = {name for name, layer in found.items() if not layer.router.needs_balance}
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        if self.layers and device.type == "mps":
            raise UserError(
                "RoutingMonitor needs a device with float64, a CPU or a GPU of CUDA or ROCm: got Apple's MPS."
            )
        self._statistics = self._empty().to(device) if found else None
        # Of each layer: sum of logsumexp * assignments, and these assignments; losses for balance with a graph, and the
        # sum of the absolute gradients that came back to them.
        self._own = torch.zeros(len(found), _OWN, dtype=torch.float64).to(device)
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(self._hear(number, name)) for number, (name, layer) in enumerate(found.items())
        ]

    def _hear(self, number: int, name: str) -> Callable[..., None]:
        @torch.compiler.disable
        def hook(layer: Any, arguments: Any, output: Any) -> None:
            if self.hearing and layer.training and not in_backward():
                self._count(number, name, output.routing)

        return hook

    def _count(self, number: int, name: str, routing: Routing) -> None:
        assert self._statistics is not None
        if self._own.device != routing.token.device:  # weights may wait in host memory
            self._statistics = self._statistics.to(routing.token.device)
            self._own = self._own.to(routing.token.device)
        with torch.no_grad():
            self._statistics.update({name: routing})
            if "logsumexp" in routing.statistics:
                count = routing.queued.sum().double()
                size = routing.statistics["logsumexp"].detach().double()
                # Where nothing is real there is no logsumexp; 0 * nan would spoil the sum.
                self._own[number, 0] += torch.where(count > 0, size * count, torch.zeros_like(count))
                self._own[number, 1] += count
        losses = {} if name in self._without else routing.losses
        balance = {key: loss for key, loss in losses.items() if key not in NO_BALANCE and loss.requires_grad}
        for loss in balance.values():
            loss.register_hook(self._came_back(number))
        if balance:
            self._balance[name] = tuple(balance)
            self._own[number, 2] += len(balance)

    def _came_back(self, number: int) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            self._own[number, 3] += gradient.detach().abs().double()

        return note

    def _empty(self) -> RoutingStatistics:
        # Processes are added by whoever reads.
        return RoutingStatistics(self.layers, fixed=self.fixed, sync_on_compute=False, dist_sync_on_step=False)

    def take(self) -> Tensor | None:
        """Float64[n], what was counted since the last call, where it lies; None without sparse layers."""
        if self._statistics is None:
            return None
        packed = torch.cat([self._statistics.packed(), self._own.reshape(-1)])
        self._statistics.reset()
        self._own.zero_()
        return packed

    def statistics(self, packed: Tensor) -> RoutingStatistics:
        """What `take` gave, or a sum of several, as statistics in host memory."""
        found = self._empty()
        found.unpack(packed[: -self._own.numel()])
        return found

    def figures(self, packed: Tensor) -> list[LayerFigures]:
        """The same as figures of each layer; `packed` is in host memory."""
        own = packed[-self._own.numel() :].view(-1, _OWN).tolist()
        statistics = self.statistics(packed)
        found = []
        for number, layer in enumerate(statistics.compute()["layers"]):
            name = layer["name"]
            size, counted, seen, gradient = own[number]
            tokens = float(getattr(statistics, f"tokens_{number}"))
            found.append(
                LayerFigures(
                    name=name,
                    load=tuple(layer["load"]),
                    learned=name not in self.fixed,
                    experts_per_token=layer["assignments"] / tokens if tokens else 1.0,
                    drop_rate=layer["drop_rate"],
                    entropy=layer["entropy"],
                    logsumexp=size / counted if counted else None,
                    balance_losses=self._balance[name],
                    balance_gradient=gradient if seen else None,
                )
            )
        return found

    def close(self) -> None:
        """Hear nothing more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.hearing = [], False


def total(parts: Iterable[Tensor]) -> Tensor | None:
    """The sum of what several calls of `LayerCounts.take` gave; None of none."""
    found = list(parts)
    return torch.stack(found).sum(0) if found else None
