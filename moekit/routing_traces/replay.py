"""Playing a trace: every token goes again where it went, whatever the router says today."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moekit.errors import UserError, nearest
from moekit.routing import Deviation, Router, Routing, RoutingContext
from moekit.routing_traces.reading import RoutingTrace
from moekit.routing_traces.recording import named_layers, require_own_routers
from moekit.routing_traces.trace import TracedLayer, TracedTokens, part_of
from moekit.stepping import in_backward

Weights = Literal["router", "recorded"]
Forward = Callable[[Tensor, RoutingContext | None], Routing]


class _Played:
    """The routings of one layer, one after the other; again the same ones where a forward is computed again."""

    def __init__(self, trace: RoutingTrace, layer: str, weights: Weights, share: tuple[int, int]) -> None:
        if layer not in trace.layers:
            raise UserError(f"the trace has no layer {layer!r}. {nearest(layer, trace.layers)}")
        self.trace, self.layer, self.weights, self.share = trace, layer, weights, share
        self._forwards = trace.forwards_of(layer)
        self._next = 0
        self._recent: list[tuple[Tensor, int]] = []
        self._repeated: set[int] = set()
        self._backward = False

    @property
    def left(self) -> int:
        """Forwards that were not played yet."""
        return len(self._forwards) - self._next

    def next(self, x: Tensor, *, training: bool) -> TracedLayer:
        """What was recorded for these tokens."""
        # Reentrant checkpointing makes its forward without a gradient, and a model in evaluation may learn too.
        mark = x.detach().double().nan_to_num().sum() if training or torch.is_grad_enabled() else None
        if in_backward():
            self._backward = True
            return self._found(self._again(mark))
        if self._backward:  # nothing of the micro-batches before is computed again
            self._recent, self._repeated, self._backward = [], set(), False
        if not self.left:
            raise UserError(
                f"the trace has ended: {self.layer} was recorded in {len(self._forwards)} forwards, and is asked for "
                "one more. Play as many forwards as were recorded."
            )
        number = self._forwards[self._next]
        self._next += 1
        if mark is not None:
            self._recent.append((mark, number))
        return self._found(number)

    def _again(self, mark: Tensor | None) -> int:
        """The forward that is computed again by activation checkpointing: that of the same tokens."""
        same = [number for seen, number in self._recent if mark is not None and torch.equal(seen, mark)]
        if not same:
            raise UserError(
                f"{self.layer} is computed again in backward with other tokens than in its forward: a trace cannot be "
                "played then."
            )
        # Of forwards of equal tokens backward comes to the last one first.
        number = next((number for number in reversed(same) if number not in self._repeated), same[-1])
        self._repeated.add(number)
        return number

    def _found(self, number: int) -> TracedLayer:
        layer = self.trace[number].layers[self.layer]
        rank, size = self.share
        if size == 1:
            return layer
        routing, mask = part_of(layer.routing, rank, size), layer.tokens.mask
        length = routing.num_tokens
        part = TracedTokens(length, None if mask is None else mask[rank * length : (rank + 1) * length])
        return dataclasses.replace(layer, routing=routing, tokens=part)


class ReplayRouter(Router):
    """Plays what the router of one layer did: the n-th forward gets the n-th routing of the trace.

    Args:
        trace: what was recorded.
        layer: the layer's name there; see `RoutingTrace.layers`.
        router: the router that chose, or one with other weights; None = nobody but the trace. It runs beside, so that
            random numbers are drawn as they were, and is asked for weights.
        weights: "router" = the combine weights of the recorded experts by the router's scores of today, with its
            losses, so that it gets a gradient (rollout routing replay); "recorded" = those of the trace, which have no
            gradient, with the recorded losses: forwards are the same, but training is not.
        share: rank and number of processes among which the tokens of each recorded batch were divided, in equal parts
            that follow each other. (0, 1) = they were not.

    Raises:
        UserError: the layer is not in the trace, experts differ, "router" is asked for and there is none or one that
            cannot weigh what it did not choose, or "recorded" and no weights were recorded; in a forward, if the trace
            has ended, or was of another number of tokens or of other padding.

    Source: rollout routing replay, arXiv:2510.11370 (the recorded experts, the policy's own scores as weights).
    """

    by_position = True

    def __init__(
        self,
        trace: RoutingTrace,
        layer: str,
        router: Router | None = None,
        *,
        weights: Weights = "router",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self._played = _Played(trace, layer, _checked(weights), share)
        self.num_experts = trace.layers[layer]
        _require_fit(self._played, router)
        self.router = router
        self.observes = router is not None and router.observes

    @property
    def left(self) -> int:
        """Forwards that were not played yet."""
        return self._played.left

    @property
    def moves(self) -> bool:
        """See `Router.moves`: the router inside does, of its own accord."""
        return False

    def observe(self, routing: Routing) -> None:  # noqa: D102
        if self.router is not None:
            self.router.observe(routing)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        own = self.router
        return _play(self._played, own, None if own is None else own.forward, x, context)


@contextlib.contextmanager
def replay(
    model: nn.Module, trace: RoutingTrace, *, weights: Weights = "router", share: tuple[int, int] = (0, 1)
) -> Iterator[Replaying]:
    """Have all sparse layers of a model play a trace, as long as the block lasts.

    Modules, parameters and their names stay as they are, so optimizers, strategies and checkpoints work as before. A
    copy of the model that is made meanwhile plays nothing. Arguments are those of `ReplayRouter`. With the same
    weights, data and seed as in the recorded run losses are the same to the last digit; under another layout they
    differ by rounding.

    Raises:
        UserError: layers of the model and of the trace are not the same, or two share a router; and as `ReplayRouter`.

    Example:
        >>> import tempfile, torch, moekit as mk
        >>> from moekit.routing_traces import read_trace, record
        >>> moe, x = mk.MoELayer(mk.routers.TopKRouter(8, 4), mk.experts.GroupedMLP(4, 8, 16)), torch.randn(32, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with record(moe, f"{folder}/routing.npz"):
        ...         first = moe(x).hidden
        ...     with replay(moe, read_trace(f"{folder}/routing.npz")):
        ...         torch.equal(moe(x).hidden, first)
        True
    """
    layers = named_layers(model)
    require_own_routers(layers)
    if missing := sorted(set(trace.layers) ^ set(layers)):
        raise UserError(
            f"the model and the trace must have the same sparse layers: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} in one of them alone. The trace has "
            f"{', '.join(trace.layers) or 'none: nothing was recorded'}."
        )
    playing: dict[str, _Played] = {}
    for name, layer in layers.items():
        playing[name] = _Played(trace, name, _checked(weights), share)
        _require_fit(playing[name], layer.router)
    forwards: list[tuple[Router, Any]] = []
    try:
        for name, layer in layers.items():
            router, played = layer.router, playing[name]
            forwards.append((router, router.__dict__.get("forward")))
            router.__dict__["forward"] = _player(played, router, router.forward)
        yield Replaying(playing)
    finally:
        for router, former in forwards:
            if former is None:
                del router.__dict__["forward"]
            else:
                router.__dict__["forward"] = former


@dataclasses.dataclass(frozen=True)
class Replaying:
    """How far a replay has come.

    Attributes:
        layers: what is played, by name.
    """

    layers: dict[str, Any]

    @property
    def left(self) -> int:
        """The most forwards that a layer has not played yet; 0 = all was played."""
        return max(played.left for played in self.layers.values())


def _player(played: _Played, router: Router, own: Forward) -> Forward:
    """The forward of a router that plays; a method, so that a copy of the router has a copy's, which does not."""

    @torch.compiler.disable
    def forward(of: Router, x: Tensor, context: RoutingContext | None = None) -> Routing:
        return _play(played, router, own, x, context) if of is router else type(of).forward(of, x, context)

    return types.MethodType(forward, router)


def _play(
    played: _Played, router: Router | None, forward: Forward | None, x: Tensor, context: RoutingContext | None
) -> Routing:
    layer = played.next(x, training=router is None or router.training)
    choice = layer.routing
    if choice.num_tokens != x.shape[0]:
        raise UserError(
            f"{played.layer} routes {x.shape[0]} tokens, and this forward of the trace was of {choice.num_tokens}. "
            "Play it on the batches that were recorded, in their order."
        )
    _require_padding(played.layer, choice.num_tokens, layer.tokens.mask, None if context is None else context.mask)
    choice = _moved(choice, x.device)
    if played.weights == "router":
        assert router is not None
        return router.imposed(x, context, choice)
    if not layer.weighed:
        raise UserError(f"the trace of {played.layer} was recorded without weights: play it with weights='router'.")
    if forward is None:
        return choice
    with torch.no_grad():  # draws what it drew
        return dataclasses.replace(choice, logits=forward(x, context).logits)


def _require_padding(layer: str, count: int, recorded: Tensor | None, mask: Tensor | None) -> None:
    """Refuse other padding than was recorded: real tokens would have no expert, or padding would take one."""
    if recorded is None and mask is None:
        return
    everything = torch.ones(count, dtype=torch.bool)
    was = everything if recorded is None else recorded
    now = everything if mask is None else mask.detach().cpu()  # host read: the trace is in host memory
    if torch.equal(was, now):
        return
    differs = (was != now).nonzero().flatten().tolist()
    words = ("a real token", "padding") if was[differs[0]] else ("padding", "a real token")
    raise UserError(
        f"{layer} is played with other padding than was recorded: token {differs[0]} was {words[0]} and is {words[1]}, "
        f"and {len(differs)} of {count} differ. Play the trace on the batches that were recorded, in their order."
    )


def _moved(routing: Routing, device: torch.device) -> Routing:
    def there(found: Any) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in found.items()}

    return dataclasses.replace(
        routing,
        **{name: getattr(routing, name).to(device) for name in ("token", "expert", "weight", "position", "kept")},
        losses=there(routing.losses),
        statistics=there(routing.statistics),
        deviations={
            name: Deviation(part.total.to(device), part.count.to(device)) for name, part in routing.deviations.items()
        },
    )


def _checked(weights: str) -> Any:
    if weights not in ("router", "recorded"):
        raise UserError(f'weights of a replay must be "router" or "recorded": got {weights!r}.')
    return weights


def _require_fit(played: _Played, router: Router | None) -> None:
    experts = played.trace.layers[played.layer]
    if router is not None and router.num_experts != experts:
        raise UserError(
            f"{played.layer} has {router.num_experts} experts, and its trace is of {experts}. Play it on a model of "
            "the same experts."
        )
    if played.weights == "router" and not (router is not None and weighs_choices(router)):
        told = "no router" if router is None else type(router).__name__
        raise UserError(
            f"weights='router' needs a router that weighs the recorded experts (`Router.imposed`), as TopKRouter and "
            f"LossFreeRouter do: {played.layer} has {told}. Play it with weights='recorded'."
        )


def weighs_choices(router: Router) -> bool:
    """Whether a router says what weights a choice has that is not its own.

    A subclass with a `forward` of its own needs an `imposed` of its own.
    """

    def owner(name: str) -> type:
        return next(kind for kind in type(router).__mro__ if name in kind.__dict__)

    return owner("imposed") is not Router and issubclass(owner("imposed"), owner("forward"))
