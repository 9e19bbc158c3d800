"""Routers, experts and dispatchers that break one rule each, for the test that the contract suite finds out.

At the top of a module, so that they can be pickled.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moekit.dispatch import Dispatched, PackedDispatcher, PaddedDispatcher
from moekit.experts import GroupedMLP
from moekit.routers import TopKRouter
from moekit.routing import Capacity, DecodingContext, Router, Routing, RoutingContext

D, E = 8, 4
TIGHT = Capacity(train=0.6, eval=None)


class Sound(TopKRouter):
    """Breaks nothing.

    Source: ours.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(D, E, **{"capacity": TIGHT, "init_scale": 1.0, **options})

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        return routing

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        return self.change(super().forward(x, context), x, context)


def add_loss(routing: Routing, value: Tensor) -> Routing:
    return dataclasses.replace(routing, losses={**routing.losses, "mine": value})


class RoutesPadding(Sound):
    """Forgets the mask. Source: ours."""

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        return super().forward(x, None)


class LeavesGaps(Sound):
    """Uses every second place. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        return dataclasses.replace(routing, position=torch.where(routing.queued, routing.position * 2, -1), capacity=99)


class Overfills(Sound):
    """Keeps everything in spite of its capacity. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        return dataclasses.replace(routing, kept=routing.queued)


class NegativeWeights(Sound):
    """Subtracts experts. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        return dataclasses.replace(routing, weight=-routing.weight)


class LosesGradient(Sound):
    """Detaches what the layer should differentiate: found where outputs carry another weight. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        return dataclasses.replace(routing, statistics={**routing.statistics, "mass": routing.weight.sum()})


class ImposesItself(Sound):
    """Chooses again where a choice is given. Source: ours."""

    def imposed(self, x: Tensor, context: RoutingContext | None, choice: Routing) -> Routing:
        return self(x, context)


class ImposesOtherWeights(Sound):
    """Weighs what is given by halves. Source: ours."""

    def imposed(self, x: Tensor, context: RoutingContext | None, choice: Routing) -> Routing:
        return dataclasses.replace(choice, weight=self(x, context).weight / 2)


class VectorLoss(Sound):
    """Returns a loss per token. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        return add_loss(routing, routing.weight)


class CountsPadding(Sound):
    """Divides a loss by all tokens. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        return add_loss(routing, (routing.weight * routing.queued).sum() / max(x.shape[0], 1))


class MultipliesByMask(Sound):
    """Clears padding by a product: NaN stays. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        real = 1.0 if context is None or context.mask is None else context.mask[:, None]
        return add_loss(routing, (x.to(routing.weight.dtype) * real).square().sum())


class DividesByZero(Sound):
    """Averages over real tokens without asking whether there are any. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        return add_loss(routing, (routing.weight * routing.queued).sum() / routing.queued.sum())


class PrefersEarly(Sound):
    """Weighs a token by its place in the batch, which is no property of the token. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        return dataclasses.replace(routing, weight=routing.weight / (1 + routing.token))


class DecodesOtherwise(Sound):
    """Takes other experts where nobody reads losses. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        if not isinstance(context, DecodingContext):
            return routing
        return dataclasses.replace(routing, expert=(routing.expert + 1) % E)


class NoisyEvaluation(Sound):
    """Adds noise always. Source: ours."""

    def logits(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        return super().logits(x, context) + torch.randn(E)


class OwnGenerator(Sound):
    """Draws from a generator of its own. Source: ours."""

    generator = torch.Generator()

    def logits(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        noise = torch.randn(x.shape[0], E, generator=self.generator) if self.training else 0.0
        return super().logits(x, context) + noise


class PeeksAhead(Sound):
    """Compares a token with the mean of all. Source: ours."""

    def logits(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        return super().logits(x, context) + 5.0 * torch.tanh(x.sum()) * torch.arange(E)


class LowPrecision(Sound):
    """Scores in whatever precision the module has. Source: ours."""

    def logits(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        return (x @ self.weight.t()).to(torch.promote_types(x.dtype, torch.float32))


class Counts(Sound):
    """Moves a buffer in forward. Source: ours."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        if self.training:
            self.load += torch.bincount(routing.expert, minlength=E)
        return routing


class Stores(Sound):
    """Leaves a loss on the module. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        self.loss = routing.losses["load_balance"]
        return routing


class Appends(Sound):
    """Collects losses in a list that was there before. Source: ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        self.seen.append(float(routing.losses["load_balance"].detach()))
        return routing


class Recomputed(Sound):
    """Computes something else the second time that a step runs it. Source: ours."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def logits(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        if self.training:
            self.calls += 1
        return super().logits(x, context) * (1 + self.calls % 2)


class BreaksGraph(Sound):
    """Reads a number from a tensor. Source: ours."""

    def change(self, routing: Routing, x: Tensor, context: RoutingContext | None) -> Routing:
        if routing.losses["load_balance"].item() > 1e9:
            return routing
        return routing


class Unpicklable(Sound):
    """Holds a lambda. Source: ours."""

    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x


class Forgetful(Sound):
    """Keeps a learned scale where the state dict does not look. Source: ours."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(()) + 0.5

    def logits(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        return super().logits(x, context) * self.scale.to(x.device)


class HalfReset(Sound):
    """Fills a buffer in the constructor only. Source: ours."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(E))


class NoSource(Sound):
    """Cites nothing."""


class NoDim(Router):
    """Does not say how wide its input is. Source: ours."""

    num_experts = E

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        raise NotImplementedError


class Bank(GroupedMLP):
    """Breaks nothing.

    Source: ours.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(E, D, 6, **{"bias": True, "activation": "silu", "init_scale": 1.0, **options})
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.w_in.is_meta:
            nn.init.normal_(self.b_in)
            nn.init.normal_(self.b_out)


class UnnamedAxes(Bank):
    """Forgets a parameter. Source: ours."""

    axes: ClassVar[Any] = {n: a for n, a in GroupedMLP.axes.items() if n != "b_in"}


class WrongAxes(Bank):
    """One name too few. Source: ours."""

    axes: ClassVar[Any] = {**GroupedMLP.axes, "w_in": ("expert", "embed")}


class ExpertElsewhere(Bank):
    """Says that the expert axis is another one. Source: ours."""

    axes: ClassVar[Any] = {**GroupedMLP.axes, "w_in": ("embed", "expert", "mlp")}


class PackedWithoutBias(Bank):
    """Drops the bias of packed rows. Source: ours."""

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        out = super().forward(rows, counts)
        return out if counts is None else out - self.b_out.repeat_interleave(counts, 0)


class PaddedGradient(Bank):
    """Right padded outputs, wrong gradients. Source: ours."""

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        out = super().forward(rows, counts)
        return out if counts is not None else out.detach() + (out - out.detach()) * 2


class MixesRows(Bank):
    """Normalises over the batch. Source: ours."""

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        return super().forward(rows - rows.mean(0, keepdim=True), counts)


class DropsInEvaluation(Bank):
    """Dropout that does not know of evaluation. Source: ours."""

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        return nn.functional.dropout(super().forward(rows, counts), 0.3, training=True)


class Widens(Bank):
    """Answers in float32. Source: ours."""

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        out = super().forward(rows, counts)
        return out.float() if out.dtype == torch.bfloat16 else out


class TouchesIdle(Bank):
    """Gives every expert a gradient, work or not. Source: ours."""

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        return super().forward(rows, counts) + (self.b_in.sum() - self.b_in.sum().detach())


class BankBreaksGraph(Bank):
    """Reads a number from a tensor. Source: ours."""

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        out = super().forward(rows, counts)
        return out if out.sum().item() > -1e30 else rows


class HalfCombine(PackedDispatcher):
    """Adds in the type of the rows."""

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        out = y.new_zeros(routing.num_tokens, y.shape[1])
        return out.index_add(0, handle.token, y * routing.weight[handle.assignment].to(y.dtype)[:, None])


class IgnoresWeights(PackedDispatcher):
    """Adds without weights."""

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        return super().combine(y, dataclasses.replace(routing, weight=torch.ones_like(routing.weight)), handle)


class KeepsResidual(PackedDispatcher):
    """Gives dropped tokens one instead of zero."""

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        out = super().combine(y, routing, handle)
        lost = torch.ones(routing.num_tokens, dtype=torch.bool).index_fill(0, routing.token[routing.kept], False)
        return out + lost[:, None]


class TrustsTheList(PackedDispatcher):
    """Takes the list to be choice-major with all tokens in each choice."""

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        if routing.num_tokens == 0:
            return super().combine(y, routing, handle)
        return super().combine(y, routing, dataclasses.replace(handle, token=handle.assignment % routing.num_tokens))


class SpillsIntoSlots(PaddedDispatcher):
    """Fills free slots with the first token."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        sent = super().dispatch(x, routing)
        if not x.shape[0]:
            return sent
        free = (sent.rows == 0).all(-1, keepdim=True)
        return dataclasses.replace(sent, rows=torch.where(free, x[0], sent.rows))


class MultipliesDropped(PackedDispatcher):
    """Sends dropped tokens along with weight zero."""

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        return super().combine(y, routing, handle) + 0.0 * self.x.sum(0)

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        self.x = x
        return super().dispatch(x, routing)


class WrongCounts(PackedDispatcher):
    """Counts what was asked for instead of what was kept, in float."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        sent = super().dispatch(x, routing)
        return dataclasses.replace(sent, counts=sent.counts.float())
