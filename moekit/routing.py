"""The vocabulary: what a router is told, what it answers, and how full an expert may get.

Legend used all over the package: T tokens, K choices of a token, E experts, C capacity of an expert, N assignments,
D model dimension, F hidden dimension of an expert, B sequences, S source positions.
"""

from __future__ import annotations

import dataclasses
import html
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._pytree import tree_map_only

from moekit.component import Component, components
from moekit.stepping import StepWatch, _Ear, writes

Priority = Literal["position", "probability", "random"]
Share = Literal["choices", "tokens"]
_T = TypeVar("_T")


def register_pytree(cls: type[_T], static: tuple[str, ...] = ()) -> type[_T]:
    """Make a dataclass a pytree; `static` fields travel as context, the others are leaves or subtrees."""
    names = [f.name for f in dataclasses.fields(cls) if f.name not in static]  # type: ignore[arg-type]

    def flatten(value: Any) -> tuple[list[Any], Any]:
        return [getattr(value, n) for n in names], tuple(getattr(value, n) for n in static)

    def unflatten(leaves: Any, context: Any) -> Any:
        return cls(**dict(zip(names, leaves, strict=True)), **dict(zip(static, context, strict=True)))

    _pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"moekit.{cls.__name__}")
    return cls


@dataclass(frozen=True)
class RoutingContext:
    """What a router may know besides the hidden states; every field is optional.

    All fields share the leading shape of the hidden states (``[T]``, or ``[B, S]`` before `flatten`).
    `previous_logits` has one dimension more.

    Attributes:
        mask: Bool. True = a real token. Padding is never routed, never counted and in no denominator.
        token_ids: Int. The token at each position (hash routers; target-side inputs in a decoder).
        previous_ids: Int. The token before it (bigram and previous-token hashes).
        next_ids: Int. The token after it, known in training only (the oracle hash, which looks ahead).
        position: Int. Place in the sequence (position hash).
        task: Int. Task or language id.
        sequence: Int in 0..B-1. Which sequence a token belongs to (balance losses of scope "sequence").
        previous_logits: Float[..., E'], `Routing.logits` of the sparse layer before in the same stack, which hands them
            on (gating residuals); None in the first.
    """

    mask: Tensor | None = None
    token_ids: Tensor | None = None
    previous_ids: Tensor | None = None
    next_ids: Tensor | None = None
    position: Tensor | None = None
    task: Tensor | None = None
    sequence: Tensor | None = None
    previous_logits: Tensor | None = None

    def flatten(self, num_tokens: int) -> RoutingContext:
        """The same context with every field of shape ``[T]``.

        Raises:
            ValueError: if a field does not hold `num_tokens` entries, or the mask is not Bool.
        """
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(
                f"RoutingContext.mask must be Bool, True for a real token: got {self.mask.dtype}. Write mask.bool()."
            )
        flat = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            own = value.shape[-1:] if f.name == "previous_logits" and value is not None else ()
            if value is not None and value.numel() != num_tokens * math.prod(own):
                raise ValueError(
                    f"RoutingContext.{f.name} must have one entry per token: got shape {tuple(value.shape)} for "
                    f"{num_tokens} tokens. Give it the leading shape of the hidden states."
                )
            flat[f.name] = None if value is None else value.reshape(num_tokens, *own)
        return type(self)(**flat)


register_pytree(RoutingContext)


@dataclass(frozen=True)
class DecodingContext(RoutingContext):
    """The context of a step of decoding, in which nobody reads losses and statistics: a router may leave them out."""


register_pytree(DecodingContext)


@dataclass(frozen=True)
class Deviation:
    """What one layer adds to a loss that is one for all layers, |sum of totals| / sum of counts.

    Such a loss binds the mean over all layers, and leaves it to them how they share it. `moekit.AuxLosses` weighs it by
    its name as it does losses by layer.

    Attributes:
        total: Float32 scalar with gradient, the sum over this layer's tokens of how far each is from the wanted value.
        count: scalar, how many tokens that are.
    """

    total: Tensor
    count: Tensor


register_pytree(Deviation)


def deviation_loss(parts: Sequence[Deviation]) -> Tensor:
    """The one loss of all layers' parts; 0 where they count no tokens.

    Example:
        >>> import torch
        >>> four, six = torch.tensor(4.0), torch.tensor(6.0)
        >>> deviation_loss([Deviation(torch.tensor(-3.0), four), Deviation(torch.tensor(1.0), six)])
        tensor(0.2000)
    """
    total = torch.stack([part.total for part in parts]).sum()
    return total.abs() / torch.stack([part.count for part in parts]).sum().clamp_min(1)


@dataclass(frozen=True, repr=False)
class Routing:
    """A list of N assignments: which token goes to which expert, with what weight, and whether there was room.

    One type for every paper: token-choice routers emit K assignments a token, expert-choice emits E*C, and so on.

    Attributes:
        token: Int64[N], in 0..num_tokens-1.
        expert: Int64[N], in 0..num_experts-1.
        weight: Float32[N], combine weight; carries the gradient to the router.
        position: Int64[N], place in the expert's queue; -1 = never queued (padding, or a choice the policy did not
            send).
        kept: Bool[N], True = computed. An assignment with ``position >= 0`` and not kept was dropped for capacity.
        losses: unweighted float32 scalars by name, with gradient.
        statistics: detached float32 scalars by name (for example ``entropy``), for logs only.
        logits: Float32[T, E], with gradient, of a router whose scores enter the next layer's (gating residuals), or
            that counts other choices than it sends when it observes (`LossFreeRouter`); else None.
        num_tokens: T, padding included.
        num_experts: E.
        capacity: slots per expert, or None = dropless.
        deviations: this layer's parts of losses that are one for all layers, by name.
        choices: K where the list is choice-major (all T first choices in token order, then all second ones, up to the
            K-th), or None = in any order. Lets `combine` sum without scattering.
        all_kept: whether it is known, without a look at `kept`, that all are kept. Spares the host a wait for the
            device.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    position: Tensor
    kept: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0
    num_experts: int = 0
    capacity: int | None = None
    deviations: Mapping[str, Deviation] = field(default_factory=dict)
    logits: Tensor | None = None
    choices: int | None = None
    all_kept: bool = False

    @property
    def queued(self) -> Tensor:
        """Bool[N]: assignments that asked for a place, kept or dropped."""
        return self.position >= 0

    def __repr__(self) -> str:
        return f"Routing({', '.join(f'{name}={value}' for name, value in self._sizes().items())})"

    def _repr_html_(self) -> str:
        """For notebooks: sizes, losses and the load of every expert. Waits for the device that holds them."""
        host = tree_map_only(Tensor, lambda leaf: leaf.detach().cpu(), self)  # host read: to be shown
        values = {**host.losses, **host.statistics}
        told = {**host._sizes(), **{name: f"{float(value):.4g}" for name, value in values.items() if not value.ndim}}
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in told.items())
        load = routing_stats(host).load.tolist()
        total, most = max(sum(load), 1), max(load, default=0) or 1
        bars = "".join(
            f'<span title="expert {e}: {n:,} ({n / total:.1%})" style="display:inline-block;width:8px;margin-right:1px;'
            f'background:#0067a5;height:{max(1, round(40 * n / most))}px"></span>'
            for e, n in enumerate(load)
        )
        return f"<table>{rows}<tr><th>load by expert</th><td>{bars}</td></tr></table>"

    def _sizes(self) -> dict[str, object]:
        """What can be said without a wait for a device: what was dropped, only of a list that the host holds."""
        found: dict[str, object] = {"tokens": self.num_tokens, "experts": self.num_experts}
        found["assignments"] = self.token.numel()
        if self.choices is not None:
            found["k"] = self.choices
        found["capacity"] = self.capacity
        if self.capacity is None or self.all_kept:
            found["dropped"] = "0.0%"
        elif type(self.kept) is Tensor and self.kept.device.type == "cpu":
            asked = int(self.queued.sum())
            found["dropped"] = f"{1 - int((self.kept & self.queued).sum()) / max(asked, 1) if asked else 0:.1%}"
        return found


register_pytree(Routing, static=("num_tokens", "num_experts", "capacity", "choices", "all_kept"))


@dataclass(frozen=True, repr=False)
class Capacity:
    """How many tokens an expert takes and who is served first when more ask.

    slots = round(factor * k * T / E), or without the k (see `share`), at least `minimum`, but never more than T, where
    T counts all positions of the batch that this process routes (padding included, so that shapes are known without
    reading data). With local groups tokens compete inside their group alone, and each group has as many slots as a
    batch of its size.

    Attributes:
        train: capacity factor in training; None = dropless.
        eval: capacity factor in evaluation; None (default) = dropless and therefore deterministic.
        minimum: least number of slots.
        priority: who is served first. "position" = first choices before second, then token order (GShard,
            arXiv:2006.16668 Algorithm 1). "probability" = highest router probability first (batch-prioritised
            routing, BPR, arXiv:2106.05974; ST-MoE, arXiv:2202.08906). "random" = a uniformly random order (random
            token selection, RTS, Z-code M3, arXiv:2109.10465); first choices before second.
        rounding: how the product becomes an integer; "nearest" takes the even one of two that are equally near.
        share: what the factor is a multiple of. "choices" = an even share of all choices, k * T / E: with k = 2 a
            factor of 1 is GShard's C = 2 T / E (arXiv:2006.16668 section 2.2). "tokens" = an even share of the tokens,
            T / E, whatever k is: arXiv:2202.08906 and Mesh-TensorFlow, whose factor of 1.25 with k = 2 leaves no room
            for 3 of 8 choices.
        group_size: positions of a local group, which follow each other in the batch; the last group may be smaller.
            None = all positions of the process are one group (GShard's groups are then the processes).

    Raises:
        ValueError: if a factor is not positive and finite, `minimum` or `group_size` is less than 1, or a
            choice is unknown.

    Source: arXiv:2006.16668 section 2.2 (local groups, 2 S / E slots for S tokens of a group).
    Differs: Random and probability priority look at later tokens, so they are not causal; routers refuse them for a
    causal decoder unless told ``allow_future=True``. Random priority acts in training only; in evaluation with a
    capacity the order is by position (DeepSpeed keeps it random). With several choices a token and a capacity,
    whatever the priority, an earlier token's second choice waits behind later tokens' first choices, as in the
    papers: a full expert may then drop it because of what comes later. Decoders accept this, as in GShard and ST-MoE;
    only k = 1 by position, or a dropless router, is strictly causal.
    """

    train: float | None = None
    eval: float | None = None
    minimum: int = 4
    priority: Priority = "position"
    rounding: Literal["ceil", "floor", "nearest"] = "ceil"
    share: Share = "choices"
    group_size: int | None = None

    def __repr__(self) -> str:
        told = [
            f for f in dataclasses.fields(self) if f.name in ("train", "eval") or getattr(self, f.name) != f.default
        ]
        return f"Capacity({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in told)})"

    def __post_init__(self) -> None:
        for name in ("train", "eval"):
            factor = getattr(self, name)
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(f"Capacity.{name} must be a positive factor or None (dropless): got {factor}.")
        if self.minimum < 1:
            raise ValueError(f"Capacity.minimum must be at least 1: got {self.minimum}.")
        if self.priority not in ("position", "probability", "random"):
            raise ValueError(f'Capacity.priority must be "position", "probability" or "random": got {self.priority!r}.')
        if self.rounding not in ("ceil", "floor", "nearest"):
            raise ValueError(f'Capacity.rounding must be "ceil", "floor" or "nearest": got {self.rounding!r}.')
        if self.share not in ("choices", "tokens"):
            raise ValueError(f'Capacity.share must be "choices" or "tokens": got {self.share!r}.')
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"Capacity.group_size must be at least 1, or None for one group: got {self.group_size}. A group should "
                "hold several tokens for each expert."
            )

    @property
    def looks_ahead(self) -> bool:
        """Whether the priority lets a token's place depend on later tokens, in training or in evaluation."""
        if self.priority == "probability":
            return self.train is not None or self.eval is not None
        return self.priority == "random" and self.train is not None

    def slots(self, num_tokens: int, num_experts: int, k: int, *, training: bool) -> int | None:
        """Slots per expert for a batch of `num_tokens`, all groups together, or None where this phase is dropless."""
        factor = self.train if training else self.eval
        if factor is None:
            return None
        if self.group_size is not None and self.group_size < num_tokens:
            whole, rest = num_tokens // self.group_size, num_tokens % self.group_size
            alone = dataclasses.replace(self, group_size=None)
            sizes = [self.group_size] * bool(whole) + [rest] * bool(rest)
            slots = [alone.slots(size, num_experts, k, training=training) or 0 for size in sizes]
            return whole * slots[0] + sum(slots[1:])
        exact = factor * (k if self.share == "choices" else 1) * num_tokens / num_experts
        # 1e-9: 1.1 * 10 is 11.000000000000002 in floating point, and one slot too many would be a silent surprise.
        rounded = {
            "ceil": math.ceil(exact - 1e-9),
            "floor": math.floor(exact + 1e-9),
            "nearest": round(exact),
        }
        return min(max(self.minimum, rounded[self.rounding]), num_tokens)


@dataclass(frozen=True)
class Compensation:
    """What keeps a layer's function where every one of its experts is there several times, with its row of the scores.

    Attributes:
        choices: factor of a token's choices: of k, or of the capacity factor of expert choice.
        scale: factor of the experts' outputs.
        own: factors of tensors of the router itself, by name.
        obstacle: why no such numbers exist; None = these are they.
    """

    choices: float = 1.0
    scale: float = 1.0
    own: Mapping[str, float] = field(default_factory=dict)
    obstacle: str | None = None

    @classmethod
    def of_best(cls, k: int, copies: float, *, divided: bool) -> Compensation:
        """Where a token takes its k best experts.

        The best k are the copies of the best k / n, so k > 1 needs n times as many choices; for k = 1 one copy will do.

        Args:
            k: choices per token, before there were copies.
            copies: n.
            divided: whether copies share one's weight (a softmax over all experts, weights that sum to 1), or each has
                it whole (from its own score alone).
        """
        if k == 1:
            return cls(scale=copies if divided else 1.0)
        return cls(choices=copies, scale=1.0 if divided else 1 / copies)


class Router(Component, ABC):
    """Chooses experts for tokens. Subclass it, set `num_experts`, return a `Routing`.

    A router owns its idea and its regulariser (returned unweighted in `Routing.losses`); it never sees experts. Its
    arithmetic is float32 whatever the precision around it.

    Attributes:
        num_experts: E.
        looks_ahead: whether a token's route may depend on later tokens of its sequence (random or probability
            priority, expert choice). A causal decoder refuses such a router.
        allow_future: whether a causal decoder shall accept a router that looks ahead.
        observes: whether `observe` wants to be told what training forwards returned.
        by_position: whether a token's experts depend on its place among the tokens of the batch even where nothing is
            dropped (dealing in turn), so that tokens in another order get other experts.
        needs_balance: whether a balance loss that it returns should weigh something; false of a router that is said to
            do without, and returns one for comparisons.
        expert_dims: dimension that counts experts, by name of a parameter or buffer of this router; what is not named
            is the same for all experts. None (default) = not known: experts can then not be taken out or added
            (`moekit.surgery`).
        expert_ids: integer buffers whose values are numbers of experts, such as the table of a hash router.
        shown: names of the attributes that ``print(model)`` shows.
    """

    num_experts: int
    looks_ahead: bool = False
    allow_future: bool = False
    observes: bool = False
    by_position: bool = False
    needs_balance: ClassVar[bool] = True
    expert_dims: ClassVar[Mapping[str, int] | None] = None
    expert_ids: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[tuple[str, ...]] = ()
    _ear: _Ear | None = None

    def __init__(self) -> None:
        super().__init__()
        self._step_watch = StepWatch()
        self.register_forward_pre_hook(_watch_steps)

    def extra_repr(self) -> str:  # noqa: D102
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)

    @property
    def moves(self) -> bool:
        """Whether forward depends on what `on_step_end` of this router or of its parts changes."""
        parts = (self, *components(self).values())
        return self.observes or any(type(part).on_step_end is not Component.on_step_end for part in parts)

    @property
    def choices_per_token(self) -> float:
        """Experts that take a token, on average, where nothing is dropped: its `k`; what work is counted by."""
        return float(getattr(self, "k", 1))

    @property
    def most_choices_per_token(self) -> float:
        """The same at the step of training that has most of them, which memory must hold."""
        return self.choices_per_token

    @property
    def multiplications_per_token(self) -> int:
        """Those of its own products for a token: one for each number in its matrices, unless a router says otherwise.

        Two floating-point operations are counted for each (`moekit.planner`). Tables that are looked up have none.
        """
        return sum(parameter.numel() for parameter in self.parameters() if parameter.dim() > 1)

    def check_causal(self) -> None:
        """Raise ValueError if this router would let a causal decoder see later tokens unasked."""
        if self.looks_ahead and not self.allow_future:
            raise ValueError(
                f"{type(self).__name__} lets a token's route depend on later tokens, which leaks the future in a "
                'causal decoder. Use Capacity(priority="position") or a dropless router there, or accept the leak '
                "with allow_future=True."
            )

    def observe(self, routing: Routing) -> None:
        """Take note of what a training forward returned: the place where load is counted. Does nothing here.

        Forward stores nothing, because activation checkpointing runs it twice. Under a Trainer every router with
        ``observes = True`` is told each `Routing` of a training batch once: after the backward of that batch, so that
        nothing moves between a forward and its recomputation, and before `on_step_end` if the optimizer has stepped.
        Validation is not told. Without a Trainer `moekit.listen` and `moekit.step_end` see to both; or call it after
        ``backward()`` and `on_step_end` after ``optimizer.step()``, without listening. What is noted is of this process
        alone; `on_step_end` sums over processes what must be the same in all.

        Args:
            routing: what forward returned; its tensors carry no gradient here.
        """

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """What keeps the layer's function where there are `copies` of every expert, each with the same scores.

        `moekit.surgery.aggregate` asks: a model that is aggregated with itself is such a layer. It holds where nothing
        is dropped, and without noise.

        Args:
            copies: n; a fraction undoes it.
            state: this router's own tensors by name, where the answer depends on them; None = asked about before.
        """
        return Compensation(obstacle=f"{type(self).__name__} does not say what copies of experts do (compensation)")

    def imposed(self, x: Tensor, context: RoutingContext | None, choice: Routing) -> Routing:
        """The assignments of `choice`, with weights, losses and statistics by this router's scores.

        Replays ask (`moekit.routing_traces`), and reinforcement learning whose rollouts chose the experts. Everything
        random is drawn as in `forward`, so that imposing what `forward` returned gives the same to the last digit.
        A router without an answer cannot be asked.

        Args:
            x: Float[T, D].
            context: fields ``[T]``.
            choice: which token goes to which expert, its place, and what is kept; its weights and losses do not matter.

        Raises:
            NotImplementedError: this kind of router does not say.
            UserError: `choice` is no list that this router could have made.
        """
        raise NotImplementedError(f"{type(self).__name__} does not weigh a choice that is not its own (imposed)")

    @abstractmethod
    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Route ``x`` Float[T, D]; `context` fields are ``[T]``."""


def _watch_steps(router: nn.Module, arguments: Any) -> None:
    """Before a training forward: does anybody tell this router of steps?"""
    if not router.training or torch.compiler.is_compiling():
        return
    assert isinstance(router, Router)
    # Its state is its buffers, and its parts': one without any has nothing that could stand still.
    state = [writes(buffer) for buffer in router.buffers()]
    if state and router.moves and not router.frozen:
        router._step_watch.see(router, router.parameters(), sum(state))


@dataclass(frozen=True)
class RoutingStats:
    """What happened to a batch of tokens, per expert.

    Attributes:
        load: Int64[E], assignments that asked for each expert (before drops).
        kept: Int64[E], assignments computed.
        load_by_group: Int64[G, E] where groups (languages, tasks) were given, else None.
    """

    load: Tensor
    kept: Tensor
    load_by_group: Tensor | None = None


register_pytree(RoutingStats)


@torch.no_grad()
def routing_stats(routing: Routing, group: Tensor | None = None, num_groups: int = 0) -> RoutingStats:
    """Count assignments by expert, and by group where one is given.

    Args:
        routing: what a router returned.
        group: Int[T] or of the shape that flattens to it, in 0..num_groups-1: a language or task id per token. The ids
            of padding do not matter.
        num_groups: G, needed with `group`.

    Raises:
        ValueError: if `group` comes without `num_groups`, or has not one entry per token.
    """
    queued = routing.queued
    ones = queued.to(torch.int64)
    load = torch.zeros(routing.num_experts, dtype=torch.int64, device=queued.device)
    kept = torch.zeros_like(load).index_add_(0, routing.expert, (routing.kept & queued).to(torch.int64))
    by_group = None
    if group is not None:
        if num_groups < 1 or group.numel() != routing.num_tokens:
            raise ValueError(
                f"routing_stats by group needs one id for each of {routing.num_tokens} tokens and num_groups of at "
                f"least 1: got {group.numel()} ids and num_groups={num_groups}."
            )
        cell = group.reshape(-1)[routing.token] * routing.num_experts + routing.expert
        cell = torch.where(queued, cell, 0)
        flat = torch.zeros(num_groups * routing.num_experts, dtype=torch.int64, device=queued.device)
        by_group = flat.index_add_(0, cell, ones).view(num_groups, routing.num_experts)
    return RoutingStats(load.index_add_(0, routing.expert, ones), kept, by_group)
