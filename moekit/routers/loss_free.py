"""Balance without a loss: a bias that only selects, moved once per step against the load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from moekit.routers.load_window import LoadWindow
from moekit.routers.queueing import (
    batch_capacity,
    clear_padding,
    queue_of,
    routing_of_choices,
    score_statistics,
    token_choices,
)
from moekit.routers.scorers import ExpertScorer, ScoredRouter
from moekit.routers.topk import Balance
from moekit.routing import Capacity, Compensation, Routing, RoutingContext

BalanceChoices = Literal["biased", "unbiased"]


@dataclass(frozen=True)
class GroupLimit:
    """Choose experts in a token's best groups only, so that it is sent to few nodes.

    The experts are cut into `groups` groups of neighbours; a group's score is the sum of its `best` highest biased
    scores, and experts outside the `chosen` highest groups are out.

    Attributes:
        groups: number of groups; must divide E.
        chosen: groups that a token may use.
        best: how many scores count for a group.

    Raises:
        ValueError: if `chosen` is not in 1..groups, or `best` is less than 1.

    Source: arXiv:2412.19437 section 2.1.2 (node-limited routing); best=2 as in the authors' code.
    """

    groups: int
    chosen: int
    best: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.groups:
            raise ValueError(
                f"GroupLimit.chosen must be between 1 and groups: got chosen={self.chosen} and groups={self.groups}."
            )
        if self.best < 1:
            raise ValueError(f"GroupLimit.best must be at least 1: got {self.best}.")

    def __call__(self, score: Tensor) -> Tensor:
        """``score`` Float[T, E], minus infinity outside the chosen groups."""
        grouped = score.unflatten(1, (self.groups, -1))
        of_group = grouped.topk(self.best, dim=-1).values.sum(-1)
        chosen = of_group.topk(self.chosen, dim=-1).indices
        allowed = torch.zeros_like(of_group, dtype=torch.bool).scatter(1, chosen, True)
        return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)


class LossFreeRouter(ScoredRouter):
    """Top-k of score + bias, weight from the score alone; the bias follows the load.

    s = sigmoid(logits) (or their softmax); the k largest s + b are the choices; weight = s. After each optimizer step
    b_e += u * sign(mean load - load_e), the load counted over all processes and micro-batches of the step. No gradient
    flows through the bias, so balance does not disturb the task.

    `dim`, `num_experts`, `scorer` and `init_scale` are those of `ScoredRouter`.

    Args:
        k: choices per token.
        update_rate: u, by how much a step moves the bias. It may be set at any time: 0 freezes the bias, as DeepSeek-V3
            does for its last tokens.
        score: "sigmoid" or "softmax" over experts.
        renormalise: scale the k weights of a token to sum to 1.
        scaling_factor: multiplies the weights at the end.
        groups: limit the choice to some groups of experts.
        balance: return ``load_balance`` with these settings beside the bias, with scores scaled to sum to 1 as
            probabilities; None = none.
        balance_choices: what that loss counts: "biased" = the choices that are sent; "unbiased" = the k best scores
            without bias and groups, of every real token. Where the bias has balanced the load, the former has nearly no
            gradient, whatever the scores. The sequence-wise loss of DeepSeek-V3 is "unbiased" with
            ``Balance(count="all", scope="sequence")``.
        capacity: slots per expert and who is served first; dropless by default.
        allow_future: accept priorities that look at later tokens in a causal decoder.

    The bias is a buffer, in checkpoints, and stays float32 in a model that is cast to less: a step of 0.001 would be
    lost there. Returns in `Routing.statistics`: ``entropy`` and ``logsumexp`` of the scores without bias, and
    ``bias_range``, the largest bias minus the smallest.

    Raises:
        ValueError: if `k` is not in 1..E (or in 1..experts of the chosen groups), `groups` do not divide E or are
            smaller than what they count, `score` or `balance_choices` is unknown, `renormalise` meets k = 1, or
            "unbiased" choices are to count after drops, or `capacity` is a `SequenceCapacity`.

    Source: arXiv:2408.15664 algorithm 1 (sign, u = 0.001); arXiv:2412.19437 section 2.1.2, eq. 16 for the choice and
        eq. 17-20 for the sequence-wise loss.
    Differs: the choice from the released code of arXiv:2412.19437 in nothing but the guard against division by zero.
        The loss that counts "biased" choices is ours. Load counts what is asked for, before capacity drops anything
        (both papers are dropless).
    """

    shown = ("dim", "num_experts", "k", "score", "update_rate", "groups")
    bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        scorer: ExpertScorer | None = None,
        update_rate: float = 1e-3,
        score: Literal["sigmoid", "softmax"] = "sigmoid",
        renormalise: bool = False,
        scaling_factor: float = 1.0,
        groups: GroupLimit | None = None,
        balance: Balance | None = None,
        balance_choices: BalanceChoices = "biased",
        capacity: Capacity | None = None,
        init_scale: float = 0.1,
        allow_future: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, scorer, init_scale=init_scale)
        available = num_experts
        if groups is not None:
            if num_experts % groups.groups or num_experts // groups.groups < groups.best:
                raise ValueError(
                    f"GroupLimit needs groups of equal size with at least best={groups.best} experts each: got "
                    f"{num_experts} experts in {groups.groups} groups. Use fewer groups, or another number of experts."
                )
            available = num_experts // groups.groups * groups.chosen
        if not 1 <= k <= available:
            raise ValueError(
                f"k must be between 1 and the number of experts that a token may choose: got k={k} and {available}."
            )
        if score not in ("sigmoid", "softmax"):
            raise ValueError(f'score must be "sigmoid" or "softmax": got {score!r}.')
        if k == 1 and renormalise:
            raise ValueError(
                "renormalise=True with k=1 makes every weight exactly 1 and leaves the router without a gradient from "
                "the task. Use renormalise=False."
            )
        if balance_choices not in ("biased", "unbiased"):
            raise ValueError(f'balance_choices must be "biased" or "unbiased": got {balance_choices!r}.')
        if balance_choices == "unbiased":
            _require_before_drop(balance)
        self.k = k
        self.update_rate, self.score = update_rate, score
        self.renormalise, self.scaling_factor = renormalise, scaling_factor
        self.groups, self.balance, self.balance_choices = groups, balance, balance_choices
        self.capacity = batch_capacity(capacity, "LossFreeRouter")
        self.allow_future = allow_future
        self.looks_ahead = self.capacity.looks_ahead
        self.observes = True
        self._load, self._balance_window = LoadWindow(num_experts), LoadWindow(num_experts)
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    @property
    def expert_dims(self) -> Mapping[str, int] | None:  # type: ignore[override]  # noqa: D102
        return {**self.scorer.expert_dims, "bias": 0}

    def reset_parameters(self) -> None:
        """Draw the scorer's parameters anew, and forget the bias."""
        super().reset_parameters()
        self.bias.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as every module does, but never take precision from the bias."""
        before = self.bias
        super()._apply(fn, recurse)
        if torch.finfo(self.bias.dtype).bits < 32:
            self.bias = before.to(self.bias.device)
        return self

    def observe(self, routing: Routing) -> None:
        """Count what was asked for; see `Router.observe`."""
        self._load.add(Balance(count="all").load(routing))
        if self.balance is None or self.balance.scope != "global":
            return
        if self.balance_choices == "biased":
            self.balance.observe(routing, self._balance_window)
            return
        assert routing.logits is not None  # of scope "global", see `_route`
        choices = 1 if self.balance.count == "first" else self.k
        expert = self._score(routing.logits).topk(choices, dim=-1).indices
        real = routing.queued[: routing.num_tokens, None].expand_as(expert)  # every real token queues once for each k
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=expert.device)
        self._balance_window.add(counts.index_add(0, expert.flatten(), real.flatten().to(torch.int64)))

    @torch.no_grad()
    def on_step_end(self, step: int) -> None:
        """Move the bias by what was observed, in all processes alike; begin a new count."""
        load = self._load.summed(self.bias.device).to(self.bias.dtype)
        self.bias += self.update_rate * torch.sign(load.mean() - load)
        self._load.clear()
        self._balance_window.clear()

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:  # noqa: D102
        if self.groups is not None:
            return Compensation(obstacle="GroupLimit would have to limit other groups")
        softmax = self.score == "softmax"
        needed = Compensation.of_best(self.k, copies, divided=self.renormalise or softmax)
        # The bias is added to probabilities, which shrink.
        return replace(needed, own={"bias": 1 / copies}) if softmax else needed

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        return self._route(x, context)

    def imposed(self, x: Tensor, context: RoutingContext | None, choice: Routing) -> Routing:  # noqa: D102
        return self._route(x, context, choice)

    def _route(self, x: Tensor, context: RoutingContext | None, choice: Routing | None = None) -> Routing:
        context = context or RoutingContext()
        x = clear_padding(x, context.mask)
        logits = self.logits(x, context)
        score = self._score(logits)
        biased = score.detach() + self.bias
        if self.groups is not None:
            biased = self.groups(biased)
        expert = biased.topk(self.k, dim=-1).indices
        own = expert
        if choice is not None:
            expert, imposed = queue_of(choice, self.k)
        chosen = score.gather(1, expert)
        weight = chosen
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        weight = weight * self.scaling_factor

        probs = score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
        statistics = score_statistics(logits, probs.detach(), context.mask)
        statistics["bias_range"] = (self.bias.max() - self.bias.min()).to(logits.dtype)
        routing = routing_of_choices(
            own,
            weight,
            self.num_experts,
            mask=context.mask,
            capacity=self.capacity,
            training=self.training,
            scores=chosen,
            statistics=statistics,
        )
        if choice is not None:  # after what the queue has drawn
            routing = token_choices(expert, weight, imposed, self.num_experts, statistics=statistics)
        if self.balance is None:
            return routing
        if self.balance_choices == "unbiased":
            _require_before_drop(self.balance)  # it may have been set since
            expert = score.detach().topk(self.k, dim=-1).indices
            counted = torch.ones_like(expert, dtype=torch.bool)  # padding is in no sum anyway
        else:
            counted = (routing.kept if self.balance.when == "after_drop" else routing.queued).view(self.k, -1).t()
        loss = self.balance.loss(
            probs,
            expert,
            counted,
            context,
            self._balance_window,
            training=self.training,
            group_size=self.capacity.group_size,
        )
        # `observe` needs the scores: the list has the biased choices alone.
        scored = self.balance_choices == "unbiased" and self.balance.scope == "global"
        return replace(routing, losses={"load_balance": loss}, logits=logits if scored else None)

    def _score(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)


def _require_before_drop(balance: Balance | None) -> None:
    if balance is not None and balance.when == "after_drop":
        raise ValueError(
            "the loss of unbiased choices counts choices that nobody sends, so none of them is dropped: got "
            'Balance(when="after_drop"). Use when="before_drop", or balance_choices="biased".'
        )


_SEQUENCE_WISE = Balance(count="all", scope="sequence")


def loss_free(dim: int, num_experts: int, *, k: int = 2, update_rate: float = 1e-3) -> LossFreeRouter:
    """Loss-free balancing: sigmoid scores, a bias that only selects, no loss, dropless.

    The update rate of 0.001 is the paper's best; ``k=2`` is ours (the paper takes 6 of 64 fine-grained experts beside 2
    shared ones).

    Source: arXiv:2408.15664 section 3 and table 4.
    """
    return LossFreeRouter(dim, num_experts, k, update_rate=update_rate)


def deepseek_v3(
    dim: int,
    num_experts: int,
    *,
    k: int = 8,
    groups: GroupLimit | None = None,
    scaling_factor: float = 2.5,
    update_rate: float = 1e-3,
    balance: Balance | None = _SEQUENCE_WISE,
    balance_choices: BalanceChoices = "unbiased",
) -> LossFreeRouter:
    """DeepSeek-V3: sigmoid scores renormalised over the chosen, bias in selection, sequence-wise balance loss.

    Weigh its losses with ``AuxLosses(load_balance=1e-4)``; pair it with a shared expert (``MoELayer(shared=...)``).

    Args:
        dim: D.
        num_experts: E; 256 in the paper.
        k: 8, as in the paper.
        groups: ``GroupLimit(groups=8, chosen=4)`` in the paper; None = all experts.
        scaling_factor: 2.5, as in the released model.
        update_rate: 0.001 in the paper until its last 0.5 T tokens, then 0.
        balance: settings of the loss; None = no loss. The default is the sequence-wise one, which needs
            `RoutingContext.sequence`.
        balance_choices: "unbiased" as in the paper's eq. 18: the loss counts the k best scores of every token, without
            the bias and the limit to groups. "biased" counts what is sent.

    Source: arXiv:2412.19437 sections 2.1.2 (eq. 12-20) and 4.2.
    """
    return LossFreeRouter(
        dim,
        num_experts,
        k,
        update_rate=update_rate,
        renormalise=True,
        scaling_factor=scaling_factor,
        groups=groups,
        balance=balance,
        balance_choices=balance_choices,
    )
