"""What routers share around their idea: clean input, initial scores, queues at the experts, the list that results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.functional.assignment import queue_positions, service_order
from moekit.functional.means import masked_mean
from moekit.routing import Capacity, Routing


@dataclass(frozen=True)
class QueueResult:
    """Which choices got a place at their experts.

    Attributes:
        position: Int64[T, K], place in the expert's queue, -1 = never queued.
        kept: Bool[T, K], had room.
        capacity: slots per expert, or None = dropless.
        order: Int64[K * T], the order of service of the choice-major list; None = list order.
        all_kept: whether it is known, without a look, that all have a place.
    """

    position: Tensor
    kept: Tensor
    capacity: int | None
    order: Tensor | None
    all_kept: bool = False


def batch_capacity(capacity: Capacity | None, router: str) -> Capacity:
    """The capacity of a router whose queues are those of the batch, or of its local groups; None = dropless.

    Args:
        capacity: what the router was given.
        router: its name, for the message.

    Raises:
        ValueError: it is none, such as a `SequenceCapacity`, whose queues are made of other tokens.
    """
    if capacity is not None and not isinstance(capacity, Capacity):
        raise ValueError(
            f"{router} needs a moekit.Capacity, whose slots are those of the batch, or None: got {capacity!r}. Of the "
            "routers only TopKRouter counts each sequence apart (SequenceCapacity)."
        )
    return capacity or Capacity()


def enqueue(
    expert: Tensor,
    requested: Tensor,
    probs: Tensor,
    num_experts: int,
    capacity: Capacity,
    *,
    training: bool,
    all_requested: bool = False,
) -> QueueResult:
    """Queue every requested choice at its expert; all first choices stand before all second choices.

    Args:
        expert: Int64[T, K], experts by choice.
        requested: Bool[T, K], False = takes no place (padding, a choice that is not sent).
        probs: Float[T, K], decides who is served first under priority "probability".
        num_experts: E.
        capacity: slots and priority.
        training: random priority acts in training only.
        all_requested: whether `requested` is known to be True throughout, as it is without padding.
    """
    t, k = expert.shape
    slots = capacity.slots(t, num_experts, k, training=training)
    priority = capacity.priority if slots is not None else "position"
    if priority == "random" and not training:
        priority = "position"
    order = service_order(probs.detach().t(), priority)
    if slots is not None and capacity.group_size is not None and capacity.group_size < t:
        return _enqueue_groups(expert, requested, num_experts, capacity, order, training=training)
    position = queue_positions(by_choice(expert), by_choice(requested), num_experts, order).view(k, t).t()
    kept = requested if slots is None else requested & (position < slots)
    return QueueResult(position, kept, slots, order, all_requested and slots is None)


def _enqueue_groups(
    expert: Tensor, requested: Tensor, num_experts: int, capacity: Capacity, order: Tensor | None, *, training: bool
) -> QueueResult:
    """`enqueue` in local groups: a queue for every expert and group, then one for the batch."""
    t, k = expert.shape
    assert capacity.group_size is not None
    whole, rest = t // capacity.group_size, t % capacity.group_size
    group = local_groups(t, capacity.group_size, expert.device)
    full, last = (capacity.slots(n, num_experts, k, training=training) or 0 for n in (capacity.group_size, rest))
    room = torch.where(group < whole, full, last).repeat(k)
    slots = capacity.slots(t, num_experts, k, training=training)
    return queue_apart(expert, requested, num_experts, group, whole + 1, room, order, slots)


def queue_apart(
    expert: Tensor,
    requested: Tensor,
    num_experts: int,
    group: Tensor,
    num_groups: int,
    room: Tensor | int,
    order: Tensor | None = None,
    slots: int | None = None,
) -> QueueResult:
    """Queue choices at the experts of their tokens' groups, which have room of their own, and then at the batch's.

    Args:
        expert: Int64[T, K].
        requested: Bool[T, K].
        num_experts: E.
        group: Int64[T], the group of each token.
        num_groups: at least as many as there are.
        room: how many choices a group's expert takes; or Int64[K * T], by choice.
        order: order of service of the choice-major list; None = list order.
        slots: slots per expert of the whole batch; None = packed rows.
    """
    t, k = expert.shape
    queued = by_choice(requested)
    apart = by_choice(expert + num_experts * group[:, None])
    kept = queued & (queue_positions(apart, queued, num_experts * num_groups, order) < room)
    order = torch.arange(t * k, device=expert.device) if order is None else order
    # The kept ones hold the first places of the whole batch's queue: dispatch relies on it.
    order = order[torch.argsort(~kept[order], stable=True)]
    position = queue_positions(by_choice(expert), queued, num_experts, order)
    return QueueResult(position.view(k, t).t(), kept.view(k, t).t(), slots, order)


def local_groups(num_tokens: int, size: int, device: torch.device) -> Tensor:
    """Int64[T]: the local group of each token, `size` tokens that follow each other."""
    return torch.arange(num_tokens, device=device) // size


def by_choice(per_token: Tensor) -> Tensor:
    """``[T, K]`` as a list of K * T with all first choices first."""
    return per_token.t().reshape(-1)


def token_choices(
    expert: Tensor,
    weight: Tensor,
    queue: QueueResult,
    num_experts: int,
    losses: Mapping[str, Tensor] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> Routing:
    """The `Routing` of ``expert`` Int64[T, K] and ``weight`` Float32[T, K] by what `enqueue` gave, choice-major."""
    t, k = expert.shape
    return Routing(
        token=torch.arange(t, device=expert.device).repeat(k),
        expert=by_choice(expert),
        weight=by_choice(weight),
        position=by_choice(queue.position),
        kept=by_choice(queue.kept),
        losses=losses or {},
        statistics=statistics or {},
        num_tokens=t,
        num_experts=num_experts,
        capacity=queue.capacity,
        choices=k,
        all_kept=queue.all_kept,
    )


def queue_of(routing: Routing, k: int) -> tuple[Tensor, QueueResult]:
    """The experts Int64[T, K] and the queue that `token_choices` made `routing` of.

    Raises:
        UserError: it is no list of K choices of every token.
    """
    if routing.choices != k:
        raise UserError(
            f"a router of k={k} needs a choice-major routing of {k} experts for every token: got one of "
            f"{routing.choices or 'no fixed number of'} choices."
        )

    def by_token(values: Tensor) -> Tensor:
        return values.view(k, routing.num_tokens).t()

    queue = QueueResult(by_token(routing.position), by_token(routing.kept), routing.capacity, None, routing.all_kept)
    return by_token(routing.expert), queue


def routing_of_choices(
    expert: Tensor,
    weight: Tensor,
    num_experts: int,
    *,
    mask: Tensor | None = None,
    capacity: Capacity | None = None,
    training: bool = False,
    scores: Tensor | None = None,
    losses: Mapping[str, Tensor] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> Routing:
    """The `Routing` of a router that has chosen experts for tokens: all choices of real tokens queue and are served.

    Args:
        expert: Int64[T, K], the K different experts of each token, or Int64[T] for one.
        weight: Float32 of the same shape, combine weights.
        num_experts: E.
        mask: Bool[T], real tokens; padding takes no place.
        capacity: slots per expert and who is served first; None = dropless.
        training: whether `capacity` is that of training (a router passes ``self.training``).
        scores: Float[T, K], highest first where `capacity` serves by probability; None = `weight`.
        losses: unweighted scalars by name.
        statistics: detached scalars by name.

    Raises:
        ValueError: if `capacity` is of another kind, such as a `SequenceCapacity`.

    Example:
        >>> import torch
        >>> routing_of_choices(torch.tensor([1, 0, 1]), torch.ones(3), num_experts=2).position
        tensor([0, 0, 1])
    """
    expert, weight = (value if value.ndim == 2 else value[:, None] for value in (expert, weight))
    requested = mask_choices(torch.ones_like(expert, dtype=torch.bool), mask)
    queue = enqueue(
        expert,
        requested,
        weight if scores is None else scores,
        num_experts,
        batch_capacity(capacity, "routing_of_choices"),
        training=training,
        all_requested=mask is None,
    )
    return token_choices(expert, weight, queue, num_experts, losses, statistics)


def routing_of_pairs(
    active: Tensor, weight: Tensor, losses: Mapping[str, Tensor], statistics: Mapping[str, Tensor]
) -> Routing:
    """The dropless `Routing` of a router that lets any number of experts run: those ``active`` Bool[T, E] says.

    Args:
        active: which experts run; none at padding.
        weight: Float32[T, E], combine weights.
        losses: unweighted scalars by name.
        statistics: detached scalars by name.
    """
    t, num_experts = active.shape
    token, expert = active.nonzero().unbind(1)  # host read: how many there are
    queued = torch.ones_like(token, dtype=torch.bool)
    return Routing(
        token=token,
        expert=expert,
        weight=weight[token, expert],
        position=queue_positions(expert, queued, num_experts),
        kept=queued,
        losses=losses,
        statistics=statistics,
        num_tokens=t,
        num_experts=num_experts,
        all_kept=True,
    )


def clear_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` Float[T, D] with zeros where `mask` is False.

    Padding may hold anything, even NaN (attention over nothing), and zero times NaN is NaN: a router clears it first.
    """
    return x if mask is None else x.masked_fill(~mask[:, None], 0.0)


def mask_choices(requested: Tensor, mask: Tensor | None) -> Tensor:
    """``requested`` Bool[T, K] without padding."""
    return requested if mask is None else requested & mask[:, None]


@torch.no_grad()
def score_statistics(
    logits: Tensor, probs: Tensor, mask: Tensor | None, logsumexp: Tensor | None = None
) -> dict[str, Tensor]:
    """``entropy`` (nats) and ``logsumexp``, means over real tokens of ``logits`` and ``probs`` Float[T, E].

    `logsumexp` is given, Float[T], where it is known and `probs` is the softmax of `logits`. The entropy is then
    logsumexp - sum p * logit, without a logarithm for every probability.
    """
    if logsumexp is None:
        logsumexp, entropy = torch.logsumexp(logits, dim=-1), torch.special.entr(probs).sum(-1)
    else:
        # A logit of -inf has probability 0 and adds nothing; rounding may leave a certain choice just below 0.
        entropy = (logsumexp - (probs * logits).nansum(-1)).clamp_min(0.0)
    return {"entropy": masked_mean(entropy, mask), "logsumexp": masked_mean(logsumexp, mask)}
