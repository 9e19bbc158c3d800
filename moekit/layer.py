"""`MoELayer`: a router, a dispatcher and experts; and `AuxLosses`, which weighs what the routers return."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moekit.component import Component
from moekit.dispatch import Dispatcher, PackedDispatcher, PaddedDispatcher
from moekit.experts.base import Experts
from moekit.routing import Router, Routing, RoutingContext, _register


@dataclass(frozen=True)
class MoEOutput:
    """Result of a Mixture-of-Experts layer.

    Attributes:
        hidden: Float of the input's shape and type; zeros where a token was dropped everywhere (add the residual
            outside).
        routing: the assignments, with losses and statistics.
    """

    hidden: Tensor
    routing: Routing

    def __iter__(self):  # type: ignore[no-untyped-def]
        """Unpack as ``hidden, routing = layer(x)``."""
        return iter((self.hidden, self.routing))


_register(MoEOutput)


class MoELayer(Component):
    """A sparse feed-forward layer: route, dispatch, compute, combine. No residual, no norm.

    Args:
        router: chooses experts.
        experts: computes them; must have as many as the router chooses from.
        dispatcher: None = padded where the routing has a capacity, packed where it is dropless.
        shared: an optional branch that every token takes; its output is added (shared expert, residual MoE).

    Raises:
        ValueError: if router and experts disagree on the number of experts.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"router and experts must agree on the number of experts: the router chooses from "
                f"{router.num_experts}, the bank has {experts.num_experts}. Build both with the same number."
            )
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatcher = dispatcher
        self._packed, self._padded = PackedDispatcher(), PaddedDispatcher()

    def check_causal(self) -> None:
        """Raise ValueError if the router looks at later tokens and was not allowed to: decoders call this."""
        self.router.check_causal()

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> MoEOutput:
        """Compute the layer.

        Args:
            x: Float[..., D].
            context: what the router may know; fields have the leading shape of `x`.
        """
        flat = x.reshape(-1, x.shape[-1])
        if context is not None:
            context = context.flatten(flat.shape[0])
        routing = self.router(flat, context)
        dispatcher = self.dispatcher
        if dispatcher is None:
            dispatcher = self._packed if routing.capacity is None else self._padded
        sent = dispatcher.dispatch(flat, routing)
        computed = self.experts(sent.rows, sent.counts)
        hidden = dispatcher.combine(computed, routing, sent.handle).to(x.dtype)
        if self.shared is not None:
            hidden = hidden + self.shared(flat)
        return MoEOutput(hidden.view(x.shape), routing)


class AuxLosses:
    """Weighs and sums the losses that routers return.

    Args:
        layers: how several layers combine: "sum" (Switch: the loss of each sparse layer is added to the objective)
            or "mean" (the coefficient does not depend on depth: fairseq's default).
        **weights: coefficient by loss name, for example ``load_balance=1e-2, router_z=1e-3``.

    Calling it with the routings of all sparse layers returns ``(total, terms)``: the weighted scalar to add to the
    objective, and the unweighted values by name (mean over the layers that have them), detached, to log.

    Raises:
        ValueError: in the call, if a weight names a loss that no routing returned.

    Source: arXiv:2101.03961 section 2.2 (1e-2); arXiv:2202.08906 eq. 6 (1e-3).
    """

    def __init__(self, *, layers: Literal["sum", "mean"] = "sum", **weights: float) -> None:
        if layers not in ("sum", "mean"):
            raise ValueError(f'AuxLosses layers must be "sum" or "mean": got {layers!r}.')
        self.weights: Mapping[str, float] = dict(weights)
        self.layers = layers

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value:g}" for name, value in self.weights.items())
        return f"AuxLosses({inside}, layers={self.layers!r})"

    def __call__(self, *routings: Routing) -> tuple[Tensor, dict[str, Tensor]]:
        """Weigh the losses of `routings`; see the class."""
        if not routings:
            return torch.zeros(()), {}
        total = routings[0].weight.new_zeros((), dtype=torch.float32)
        terms: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            values = [r.losses[name] for r in routings if name in r.losses]
            if not values:
                known = sorted({n for r in routings for n in r.losses})
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"AuxLosses weighs {name!r}, but no router returned a loss of that name; they returned "
                    f"{known or 'none'}.{hint}"
                )
            stacked = torch.stack(values)
            total = total + weight * (stacked.sum() if self.layers == "sum" else stacked.mean())
            terms[name] = stacked.mean().detach()
        return total, terms
