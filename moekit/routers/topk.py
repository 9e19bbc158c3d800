"""Top-k token choice: every token picks its k best experts by a softmax over its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moekit.functional.few import is_few
from moekit.functional.losses import BalanceScope, load_balance, router_z
from moekit.kernels.gpu.backend import Backend, choose
from moekit.routers.exploration import Exploration
from moekit.routers.few_topk import few_routing
from moekit.routers.fused_topk import fused_routing, is_in_order
from moekit.routers.gating_residual import GatingResidual
from moekit.routers.load_window import LoadWindow
from moekit.routers.overflow import NoTokenLeftBehind
from moekit.routers.queueing import (
    clear_padding,
    enqueue,
    local_groups,
    mask_choices,
    queue_of,
    score_statistics,
    token_choices,
)
from moekit.routers.scorers import ExpertScorer, ScoredRouter
from moekit.routers.second_expert import (
    AllChoices,
    RandomChoice,
    SampledChoice,
    SecondExpertPolicy,
    ThresholdChoice,
)
from moekit.routers.sequence_capacity import SequenceCapacity
from moekit.routing import Capacity, Compensation, DecodingContext, Routing, RoutingContext

Renormalise = Literal["none", "before_drop", "after_drop"]


@dataclass(frozen=True)
class Balance:
    """How the load-balancing loss counts.

    Attributes:
        count: "first" counts first choices only (GShard, Mesh-TensorFlow, fairseq), "all" counts all k.
        when: "before_drop" counts what asked for a place in a queue, "after_drop" what was computed.
        scope: over which tokens the loss counts, as in `moekit.functional.load_balance`. "group" counts each local
            group (`Capacity.group_size`) apart and takes the mean of the groups' losses, as Algorithm 1 does. "global"
            counts over all processes and over the micro-batches of the optimizer step so far (a Trainer, or
            `moekit.listen`, feeds `Router.observe`). In evaluation it is "batch", so that processes may evaluate
            different numbers of batches.

    Raises:
        ValueError: if a field has none of the values above.

    Source: arXiv:2006.16668 Algorithm 1 (first choices, before drops); arXiv:2501.11873 (scope "global").
    """

    count: Literal["first", "all"] = "first"
    when: Literal["before_drop", "after_drop"] = "before_drop"
    scope: BalanceScope | Literal["group"] = "batch"

    def __post_init__(self) -> None:
        allowed = {
            "count": ("first", "all"),
            "when": ("before_drop", "after_drop"),
            "scope": ("batch", "sequence", "group", "global"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"Balance.{name} must be one of {', '.join(values)}: got {getattr(self, name)!r}.")

    def load(self, routing: Routing) -> Tensor:
        """Int64[E]: what the loss counted of a routing whose list is choice-major."""
        hit = routing.kept if self.when == "after_drop" else routing.queued
        choices = routing.num_tokens if self.count == "first" else routing.expert.numel()
        counts = torch.zeros(routing.num_experts, dtype=torch.int64, device=hit.device)
        return counts.index_add(0, routing.expert[:choices], hit[:choices].to(torch.int64))

    def observe(self, routing: Routing, window: LoadWindow) -> None:
        """Add the load to what later micro-batches of the step count as well, for scope "global"."""
        if self.scope == "global":
            window.add(self.load(routing))

    def loss(
        self,
        probs: Tensor,
        expert: Tensor,
        counted: Tensor,
        context: RoutingContext,
        window: LoadWindow,
        *,
        training: bool,
        group_size: int | None = None,
    ) -> Tensor:
        """The unweighted balance loss of a forward.

        Args:
            probs: Float[T, E], rows sum to 1.
            expert: Int64[T, K].
            counted: Bool[T, K], the choices that count.
            context: mask, and `sequence` for scope "sequence".
            window: what `observe` added of the earlier micro-batches of this step; for scope "global" in training.
            training: the phase.
            group_size: tokens of a local group, for scope "group"; None = all.
        """
        choices = 1 if self.count == "first" else expert.shape[1]
        sequence, scope = context.sequence, self.scope
        if scope == "group":
            sequence = local_groups(len(probs), group_size or max(len(probs), 1), probs.device)
            scope = "sequence"
        elif scope == "global" and not training:
            scope = "batch"
        return load_balance(
            probs,
            expert[:, :choices],
            counted[:, :choices],
            mask=context.mask,
            sequence=sequence,
            scope=scope,
            earlier=window.counts if scope == "global" else None,
        )


class TopKRouter(ScoredRouter):
    """Softmax over the scores, k best experts, weight = probability.

    p = softmax(logits) over ALL experts; the k largest are the choices (so k = 1 keeps a gradient to the router);
    arithmetic in float32 ("selective precision").

    `dim`, `num_experts`, `scorer` and `init_scale` are those of `ScoredRouter`.

    Args:
        k: choices per token.
        capacity: slots per expert and who is served first; dropless by default. `SequenceCapacity` counts each sequence
            apart.
        renormalise: whether the k weights of a token are scaled to sum to 1: "none", "before_drop" (a dropped choice
            takes its weight along: GShard, ST-MoE) or "after_drop" (the surviving choices share it: fairseq,
            DeepSpeed).
        second_expert: how the choices after the first are picked and which are sent; None = `AllChoices`.
        exploration: noise in training (`InputJitter`, ...); None = argmax.
        overflow: what becomes of choices that find no room: None = dropped, or `NoTokenLeftBehind`.
        balance: how the load-balancing loss counts.
        residual: adds the scores of the sparse layer before, and hands these scores on; None = layers know nothing of
            each other.
        allow_future: accept priorities that look at later tokens in a causal decoder.

    Returns in `Routing.losses`: ``load_balance`` and ``router_z``; in `Routing.statistics`: ``entropy`` (nats, mean
    over real tokens) and ``logsumexp``; nothing in a step of decoding (`DecodingContext`). Assignments are listed
    choice-major: all first choices, then all second.

    Raises:
        ValueError: if `k` is not in 1..E; if `renormalise` is unknown, or meets k = 1; if `overflow` meets a capacity
            by sequence or by local groups, or a balance loss that would count its first tries over a whole step; if
            `residual` is of another number of experts; if `init_scale` is given beside a scorer.

    Source: arXiv:2101.03961 section 2.1 and 2.4; arXiv:2006.16668 Algorithm 1; arXiv:2202.08906 section 3.
    Differs: later choices take their place after all first choices, kept or not (Algorithm 1 counts
        overflow too). In evaluation nothing is random and, by default, nothing is dropped.
    """

    shown = ("dim", "num_experts", "k", "scorer", "capacity")
    backend: Backend = "auto"
    """Who computes; see `moekit.use_backend`."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        scorer: ExpertScorer | None = None,
        capacity: Capacity | SequenceCapacity | None = None,
        renormalise: Renormalise = "none",
        second_expert: SecondExpertPolicy | None = None,
        exploration: Exploration | None = None,
        overflow: NoTokenLeftBehind | None = None,
        balance: Balance | None = None,
        residual: GatingResidual | None = None,
        init_scale: float = 0.1,
        allow_future: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, scorer, init_scale=init_scale)
        if not 1 <= k <= num_experts:
            raise ValueError(
                f"k must be between 1 and num_experts: got k={k} and num_experts={num_experts}. A token cannot "
                "choose more experts than there are."
            )
        if renormalise not in ("none", "before_drop", "after_drop"):
            raise ValueError(f'renormalise must be "none", "before_drop" or "after_drop": got {renormalise!r}.')
        if k == 1 and renormalise != "none":
            raise ValueError(
                f"renormalise={renormalise!r} with k=1 makes every weight exactly 1 and leaves the router without a "
                'gradient from the task. Use "none".'
            )
        if overflow is not None and isinstance(capacity, SequenceCapacity):
            raise ValueError(
                "overflow finds room in the whole batch, SequenceCapacity counts each sequence apart: got both. Leave "
                "one of them out."
            )
        if overflow is not None and isinstance(capacity, Capacity) and capacity.group_size is not None:
            raise ValueError(
                "overflow finds room in the whole batch, local groups have room of their own: got overflow and "
                f"Capacity.group_size={capacity.group_size}. Leave one of them out."
            )
        balance = balance or Balance()
        if overflow is not None and balance.scope == "global" and balance.when == "before_drop":
            raise ValueError(
                'A balance loss of scope "global" counts where the choices of earlier micro-batches ended, so with '
                "overflow it cannot count first tries: got when='before_drop'. Use "
                'Balance(scope="global", when="after_drop").'
            )
        self.k = k
        self.capacity: Capacity | SequenceCapacity = capacity or Capacity()
        self.renormalise, self.second_expert = renormalise, second_expert or AllChoices()
        self.exploration, self.overflow = exploration, overflow
        self.balance = balance
        if residual is not None and residual.num_experts != num_experts:
            raise ValueError(
                f"residual must give as many scores as there are experts: got {residual.num_experts} for {num_experts}."
            )
        self.residual = residual
        self.allow_future = allow_future
        limited = isinstance(self.capacity, Capacity) and (self.capacity.train, self.capacity.eval) != (None, None)
        self.looks_ahead = self.capacity.looks_ahead or (overflow is not None and limited)
        self.observes = self.balance.scope == "global"
        self._window = LoadWindow(num_experts)

    @property
    def expert_dims(self) -> Mapping[str, int] | None:  # type: ignore[override]
        """The scorer's; None beside a residual, whose map has two dimensions that count experts."""
        return None if self.residual is not None else super().expert_dims

    def observe(self, routing: Routing) -> None:
        """Count load for the balance loss of the micro-batches that follow in this step; see `Router.observe`."""
        self.balance.observe(routing, self._window)

    @property
    def moves(self) -> bool:
        """See `Router.moves`: beginning a new count moves nothing where nothing is counted."""
        return self.observes or type(self).on_step_end is not TopKRouter.on_step_end

    def on_step_end(self, step: int) -> None:  # noqa: D102
        self._window.clear()

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`: all copies together have one's weight."""
        if isinstance(self.second_expert, ThresholdChoice):
            return Compensation(obstacle="ThresholdChoice compares weights that copies share")
        return Compensation.of_best(self.k, copies, divided=True)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        return self._route(x, context)

    def imposed(self, x: Tensor, context: RoutingContext | None, choice: Routing) -> Routing:
        """See `Router.imposed`; with `overflow` a loss that counts first tries counts this router's own."""
        return self._route(x, context, choice)

    def _route(self, x: Tensor, context: RoutingContext | None, choice: Routing | None = None) -> Routing:
        context = context or RoutingContext()
        x = clear_padding(x, context.mask)
        exploration = self.exploration if self.training else None
        if exploration is not None:
            x = exploration.perturb(x.to(torch.promote_types(x.dtype, torch.float32)))
        logits = self.logits(x, context)
        if self.residual is not None:
            logits = logits + self.residual(context)
        own = choice is None
        if own and choose(self.backend, logits, "router").name == "triton" and self._is_plain(exploration):
            return self._fused(logits, context)
        decoding = isinstance(context, DecodingContext)
        if (
            own
            and decoding
            and context.mask is None
            and is_few(logits, logits.shape[0] * self.k)
            and self._is_plain_choice()
        ):
            return few_routing(logits, self.k, self.renormalise)
        # Once for loss and statistics. What a residual adds to padding may be NaN, which the loss clears for itself.
        logsumexp = logits.logsumexp(-1) if self.residual is None and not decoding else None
        probs = logits.softmax(-1)
        likely = probs.detach()
        ranked = likely if exploration is None else exploration.rank(likely)
        expert = self.second_expert.pick(ranked, likely, self.k, training=self.training)

        selected = torch.ones_like(expert, dtype=torch.bool)
        if self.k > 1:
            weight = self._weights(probs, expert)
            sent = self.second_expert.send(weight[:, 1:], training=self.training)
            selected = torch.cat([selected[:, :1], sent], dim=1)
        requested = mask_choices(selected, context.mask)
        if isinstance(self.capacity, SequenceCapacity):
            queue = self.capacity.enqueue(expert, requested, context.sequence, self.num_experts)
        else:
            all_requested = context.mask is None and (
                self.k == 1 or self.second_expert.sends_all(training=self.training)
            )
            queue = enqueue(
                expert,
                requested,
                probs.gather(1, expert),
                self.num_experts,
                self.capacity,
                training=self.training,
                all_requested=all_requested,
            )
        tried = expert
        if self.overflow is not None:
            expert, queue = self.overflow(expert, requested, likely, queue)
        if choice is not None:
            expert, queue = queue_of(choice, self.k)
            if self.overflow is None:
                tried, requested = expert, queue.position >= 0

        weight = self._weights(probs, expert)
        if self.renormalise == "after_drop":
            surviving = weight * queue.kept
            weight = surviving / surviving.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        losses: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        if not decoding:
            after = self.balance.when == "after_drop"
            counted = (expert, queue.kept) if after else (tried, requested)
            losses = self._losses(logits, logsumexp, probs, *counted, context)
            statistics = score_statistics(logits, probs, context.mask, logsumexp)
        routing = token_choices(expert, weight, queue, self.num_experts, losses, statistics)
        return routing if self.residual is None else dataclasses.replace(routing, logits=logits)

    def _is_plain(self, exploration: Exploration | None) -> bool:
        """Whether there is nothing in this phase but what `fused_routing` does."""
        return (
            type(self)._losses is TopKRouter._losses
            and type(self)._weights is TopKRouter._weights
            and self.residual is None
            and self.overflow is None
            and type(self.second_expert) is AllChoices
            and (exploration is None or type(exploration).rank is Exploration.rank)
            and is_in_order(self.capacity, self.num_experts, training=self.training)
            and self.balance.when == "before_drop"
            and (self.balance.scope == "batch" or (self.balance.scope == "global" and not self.training))
        )

    def _is_plain_choice(self) -> bool:
        """Whether evaluation sends the k most probable experts of each token, drops nothing and hands nothing on."""
        return (
            not self.training
            and type(self)._weights is TopKRouter._weights
            and self.residual is None
            and self.overflow is None
            and type(self.second_expert) in (AllChoices, RandomChoice, SampledChoice)  # one and the same in evaluation
            and isinstance(self.capacity, Capacity)
            and self.capacity.eval is None
        )

    def _fused(self, logits: Tensor, context: RoutingContext) -> Routing:
        assert isinstance(self.capacity, Capacity)
        return fused_routing(
            logits,
            context.mask,
            self.k,
            self.capacity,
            self.renormalise,
            count_all=self.balance.count == "all",
            training=self.training,
        )

    def _weights(self, probs: Tensor, expert: Tensor) -> Tensor:
        """Float32[T, K]: combine weights of ``expert`` Int64[T, K], before what "after_drop" does."""
        weight = probs.gather(1, expert)
        if self.renormalise != "before_drop":
            return weight
        # The best expert's probability is 1 / E or more, but `overflow` and `imposed` name experts whose probabilities
        # may all have become 0.
        return weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)

    def _losses(
        self,
        logits: Tensor,
        logsumexp: Tensor | None,
        probs: Tensor,
        expert: Tensor,
        counted: Tensor,
        context: RoutingContext,
    ) -> dict[str, Tensor]:
        balance = self.balance.loss(
            probs,
            expert,
            counted,
            context,
            self._window,
            training=self.training,
            group_size=getattr(self.capacity, "group_size", None),
        )
        return {"load_balance": balance, "router_z": router_z(logits, context.mask, logsumexp)}
