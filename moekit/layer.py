"""`MoELayer`: a router, a dispatcher and experts; and `AuxLosses`, which weighs what the routers return."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moekit.component import Component
from moekit.dispatch import Dispatcher, Exchange, PackedDispatcher, PaddedDispatcher
from moekit.dispatch.base import ExchangeDispatcher
from moekit.errors import nearest
from moekit.experts.base import Experts
from moekit.experts.dense_pretraining import DensePretraining
from moekit.experts.fused import weighted_sum
from moekit.kernels.gpu.backend import Backend, use_backend
from moekit.mixing import ExpertOutputMasking, Mix, Mixed
from moekit.routing import Router, Routing, RoutingContext, deviation_loss, register_pytree

MOST_SLOTS = 8
"""Slots for each assignment up to which a `MoELayer` pads by itself: as many as eight experts without a limit have."""
FEW_SLOTS = 8192
"""Slots that are padded in any case: they take little memory, and rows would have to be counted on the host."""


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


register_pytree(MoEOutput)


class MoELayer(Component):
    """A sparse feed-forward layer: route, dispatch, compute, combine. No residual, no norm.

    Args:
        router: chooses experts.
        experts: computes them; must have as many as the router chooses from.
        dispatcher: None = packed where the routing is dropless, and on a CPU, where the number of rows is known and
            empty slots would be multiplied, and sent to other ranks; elsewhere padded where the routing has a capacity,
            unless that would make more than `MOST_SLOTS` slots for each assignment and more than `FEW_SLOTS` in all (as
            a capacity factor that amounts to no limit does). Experts that are spread over GPUs keep their slots, which
            needs no look at a device.
        shared: an optional branch that every token takes: DeepSeek's shared experts (several are one wider
            feed-forward, see `moekit.experts.fine_grained`), the fixed branch of residual MoE, NLLB's dense branch.
            Where experts are spread over processes, it is computed while tokens travel to them, and its gradients
            while the tokens' gradients travel back.
        mix: how the shared branch and the experts are joined; None = added (arXiv:2401.06066, and arXiv:2201.05596 as
            in the paper). See `moekit.mixing`.
        output_masking: zeroes some experts' outputs in training (NLLB).
        phase: until a step, compute all experts as one dense feed-forward.
        backend: who computes router and experts; None = as they say themselves. See `moekit.use_backend`.

    Raises:
        UserError: if there is no such backend, or if what it needs is not installed.
        ValueError: if router and experts disagree on the number of experts, if router, experts, shared branch and mix
            are not of one width as far as they say it (``dim``, or ``in_features``), if there is a mix and nothing to
            mix with, or if the experts cannot be one.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher | None = None,
        shared: nn.Module | None = None,
        *,
        mix: Mix | None = None,
        output_masking: ExpertOutputMasking | None = None,
        phase: DensePretraining | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"router and experts must agree on the number of experts: the router chooses from "
                f"{router.num_experts}, the bank has {experts.num_experts}. Build both with the same number."
            )
        if mix is not None and shared is None:
            raise ValueError(
                f"MoELayer's mix joins the experts with a shared branch: got {type(mix).__name__} and no `shared`. "
                "Give a feed-forward as `shared`, or leave `mix` out."
            )
        _require_one_width({"router": router, "experts": experts, "shared branch": shared, "mix": mix})
        if phase is not None:
            phase.begin(experts)
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatcher = dispatcher
        self.mix, self.output_masking, self.phase = mix, output_masking, phase
        self._packed, self._padded = PackedDispatcher(), PaddedDispatcher()
        if backend is not None:
            use_backend(self, backend)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.num_experts

    def extra_repr(self) -> str:  # noqa: D102
        told = "" if self.dispatcher is None else f", dispatcher={type(self.dispatcher).__name__}"
        return f"num_experts={self.num_experts}{told}"

    @property
    def requires_whole_bank(self) -> bool:
        """Whether the experts must not be spread over processes: of their kind, or as long as they are tied."""
        return self.experts.requires_whole_bank or (self.phase is not None and self.phase.active)

    def connect(self, exchange: Exchange | None) -> None:
        """Send rows to the ranks that hold their experts; None = all experts are here."""
        if self.dispatcher is not None:
            self.dispatcher = self.dispatcher.across(exchange)
        self._packed, self._padded = self._packed.across(exchange), self._padded.across(exchange)

    def check_causal(self) -> None:
        """Raise ValueError if the router looks at later tokens and was not allowed to: decoders call this."""
        self.router.check_causal()

    def on_step_end(self, step: int) -> None:
        """Part the experts when the dense phase is over."""
        if self.phase is not None:
            self.phase.advance(self.experts, step)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> MoEOutput:
        """Compute the layer.

        Args:
            x: Float[..., D].
            context: what the router may know; fields have the leading shape of `x`.
        """
        flat = x.reshape(-1, x.shape[-1])
        if context is not None:
            context = context.flatten(flat.shape[0])
        shared: Tensor | None = None
        if self.phase is not None and self.phase.active:
            hidden, routing = self._dense(self.phase, flat, context)
        else:
            hidden, routing, shared = self._sparse(flat, context)
        hidden = hidden.to(x.dtype)
        if self.shared is not None and shared is None:
            shared = self.shared(flat)
        if self.mix is not None:
            assert shared is not None
            mixed: Mixed = self.mix(flat, hidden, shared, context)
            hidden = mixed.hidden
            routing = dataclasses.replace(
                routing,
                losses={**routing.losses, **mixed.losses},
                statistics={**routing.statistics, **mixed.statistics},
                deviations={**routing.deviations, **mixed.deviations},
            )
        elif shared is not None:
            hidden = hidden + shared
        return MoEOutput(hidden.view(x.shape), routing)

    def _sparse(self, x: Tensor, context: RoutingContext | None) -> tuple[Tensor, Routing, Tensor | None]:
        """The experts' sum, the routing, and the shared branch where it was computed while rows travelled."""
        routing: Routing = self.router(x, context)
        if self.output_masking is not None:
            routing = self.output_masking(routing)
        dispatcher = self.dispatcher
        if dispatcher is None:
            dispatcher = self._packed if self._packs(x, routing) else self._padded
        shared: Tensor | None = None
        ours = _whose_steps_are_known(dispatcher)
        if ours is not None and ours.exchange is None:
            whole = weighted_sum(self.experts, x, routing)
            if whole is not None:
                return whole, routing, None
        if ours is not None and ours.exchange is not None and self.shared is not None:
            wait = ours.dispatch_async(x, routing)
            try:
                shared = self.shared(x)
            except Exception:
                with contextlib.suppress(Exception):  # the branch's own error is the one to tell
                    wait()  # or the message would be nobody's, and come after the next ones
                raise
            sent = wait()
            del wait  # and with it the rows as they came
        else:
            sent = dispatcher.dispatch(x, routing)
        computed = self.experts(sent.rows, sent.counts)
        return dispatcher.combine(computed, routing, sent.handle), routing, shared

    def _packs(self, x: Tensor, routing: Routing) -> bool:
        """Whether rows are packed where nobody said which dispatcher to take; the same on all ranks."""
        if routing.capacity is None:
            return True
        if torch.compiler.is_compiling():  # sizes may be symbols there
            return False
        on_cpu = x.device.type == "cpu" and type(x) is Tensor  # where counting costs nothing, and empty slots do
        if on_cpu or self._packed.exchange is not None:
            return on_cpu
        slots = routing.num_experts * (routing.capacity or 0)
        return slots > max(FEW_SLOTS, MOST_SLOTS * routing.token.numel())

    def _dense(self, phase: DensePretraining, x: Tensor, context: RoutingContext | None) -> tuple[Tensor, Routing]:
        routing = phase.routing(self.router, x, context)
        padding = ~routing.kept[:, None]
        hidden = phase(self.experts, x.masked_fill(padding, 0.0)) * routing.weight.to(x.dtype)[:, None]
        return hidden.masked_fill(padding, 0.0), routing


def _whose_steps_are_known(dispatcher: Dispatcher) -> ExchangeDispatcher | None:
    """The dispatcher, if it is one of `moekit.dispatch`; one derived from these may do something else."""
    return dispatcher if type(dispatcher) is PackedDispatcher or type(dispatcher) is PaddedDispatcher else None


def _require_one_width(parts: Mapping[str, nn.Module | None]) -> None:
    widths = {name: found for name, part in parts.items() if (found := _width(part)) is not None}
    first = next(iter(widths), "")
    for name, width in widths.items():
        if width != widths[first]:
            raise ValueError(
                f"the {first} and the {name} of a MoELayer must be of one width, that of its tokens: the {first} has "
                f"dim {widths[first]}, the {name} {width}. Build both with the same dim."
            )


def _width(part: nn.Module | None) -> int | None:
    """Channels of the tokens that a part reads; None where it does not say them, as a table of experts by token."""
    if isinstance(part, nn.Sequential):
        return next((found for inner in part if (found := _width(inner)) is not None), None)
    said = (getattr(part, name, None) for name in ("dim", "in_features"))
    return next((width for width in said if isinstance(width, int)), None)


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoELayer]]:
    """Every `MoELayer` of a model with its dotted path."""
    for path, module in model.named_modules():
        if isinstance(module, MoELayer):
            yield path, module


class AuxLosses:
    """Weighs and sums the losses that routers return.

    Args:
        layers: how several layers combine: "sum" (Switch: the loss of each sparse layer is added to the objective)
            or "mean" (the coefficient does not depend on depth: fairseq's default).
        **weights: coefficient by loss name, for example ``load_balance=1e-2, router_z=1e-3``.

    A loss that is one for all layers (`moekit.routing.Deviation`) is weighed once, whatever `layers` says.

    Calling it with the routings of all sparse layers returns ``(total, terms)``: the weighted scalar to add to the
    objective, and the unweighted values by name (mean over the layers that have them), detached, to log.

    Raises:
        TypeError: in the call, if it is given anything but routings, one by one.
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
        if wrong := [type(routing).__name__ for routing in routings if not isinstance(routing, Routing)]:
            raise TypeError(f"AuxLosses takes routings one by one, as in aux(*output.routings): got a {wrong[0]}.")
        total = routings[0].weight.new_zeros((), dtype=torch.float32)
        terms: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            values = [r.losses[name] for r in routings if name in r.losses]
            parts = [r.deviations[name] for r in routings if name in r.deviations]
            if not values and not parts:
                known = {n for r in routings for n in (*r.losses, *r.deviations)}
                raise ValueError(
                    f"AuxLosses weighs {name!r}, but no router returned a loss of that name. {nearest(name, known)}"
                )
            found = []
            if values:
                stacked = torch.stack(values)
                total = total + weight * (stacked.sum() if self.layers == "sum" else stacked.mean())
                found.append(stacked.mean().detach())
            if parts:
                joint = deviation_loss(parts)
                total = total + weight * joint
                found.append(joint.detach())
            terms[name] = torch.stack(found).mean()
        return total, terms
