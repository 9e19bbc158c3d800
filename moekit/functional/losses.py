"""Router losses, unweighted: who weighs them is the objective (`moekit.layer.AuxLosses`)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.functional.means import masked_mean
from moekit.functional.ordered_sums import sum_by_index

BalanceScope = Literal["batch", "sequence", "global"]


def load_balance(
    probs: Tensor,
    expert: Tensor,
    counted: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    sequence: Tensor | None = None,
    scope: BalanceScope = "batch",
    group: dist.ProcessGroup | None = None,
    earlier: Tensor | None = None,
) -> Tensor:
    """Load-balancing loss of Switch Transformers: E * sum_e f_e * P_e.

    f_e is the share of the counted assignments that go to expert e (no gradient), P_e its mean probability over real
    tokens. 1.0 where load or probabilities are uniform, up to E where everything goes to one expert with certainty.

    Args:
        probs: Float[T, E], rows sum to 1.
        expert: Int64[T, K], chosen experts. Pass only the first column to count first choices alone (GShard).
        counted: Bool[T, K], which assignments count in f; None = all. Pass what was kept to count after drops.
        mask: Bool[T], real tokens; padding is in no sum and in no denominator.
        sequence: Int64[T], needed for scope "sequence".
        scope: over which tokens f and P are taken. "batch" = the tokens given; "sequence" = each sequence apart, then
            the mean over sequences; "global" = f summed over all ranks of `group` and over `earlier`, P local
            but over the mean number of real tokens of a rank: the mean of the ranks' losses is that of all tokens.
        group: process group for scope "global"; None = the world. Without torch.distributed nothing is summed.
        earlier: Int64[E] or Float[E], for scope "global": assignments counted on this process in the micro-batches
            of the same optimizer step that came before.

    Returns:
        Float scalar. 0 where there is no real token.

    Raises:
        ValueError: if `scope` is unknown, or is "sequence" and `sequence` is missing; if `earlier` comes with another
            scope than "global".

    Source: arXiv:2101.03961 eq. 4-6; arXiv:2006.16668 Algorithm 1; scope "global": arXiv:2501.11873.
    Differs: f is divided by the number of counted assignments, so k > 1 keeps the minimum at 1. GShard's own loss is
        this one divided by E**2.

    Example:
        >>> import torch
        >>> load_balance(torch.full((8, 4), 0.25), torch.arange(8)[:, None] % 4)
        tensor(1.)
    """
    if scope not in ("batch", "sequence", "global"):
        raise ValueError(f'load_balance scope must be "batch", "sequence" or "global": got {scope!r}.')
    if earlier is not None and scope != "global":
        raise ValueError(
            f'load_balance adds earlier counts for scope "global" only: got {scope!r}. Leave `earlier` out.'
        )
    t, num_experts = probs.shape
    real = torch.ones(t, dtype=torch.bool, device=probs.device) if mask is None else mask
    # Filled, not multiplied: zero times the NaN that padding may hold is NaN.
    probs = probs if mask is None else probs.masked_fill(~mask[:, None], 0.0)
    hit = real[:, None].expand_as(expert)
    if counted is not None:
        hit = hit & counted
    if scope == "sequence":
        if sequence is None:
            raise ValueError(
                'load_balance with scope="sequence" needs to know which sequence each token belongs to: '
                'RoutingContext.sequence is None. Fill it, or use scope="batch".'
            )
        return _by_sequence(probs, expert, hit, real, sequence)
    counts = torch.zeros(num_experts, dtype=probs.dtype, device=probs.device)
    counts = counts.index_add(0, expert.reshape(-1), hit.reshape(-1).to(probs.dtype))
    if earlier is not None:
        counts = counts + earlier.to(counts)
    tokens = real.sum().to(probs.dtype)
    if scope == "global" and dist.is_available() and dist.is_initialized():
        both = torch.cat([counts, tokens[None]])
        dist.all_reduce(both, group=group)
        counts, tokens = both[:-1], both[-1] / dist.get_world_size(group)
    share = counts / counts.sum().clamp_min(1)
    mean_probs = probs.sum(0) / tokens.clamp_min(torch.finfo(probs.dtype).tiny)
    return num_experts * (share * mean_probs).sum()


def _by_sequence(probs: Tensor, expert: Tensor, hit: Tensor, real: Tensor, sequence: Tensor) -> Tensor:
    """The loss of each sequence apart, averaged over the sequences that have a real token."""
    t, num_experts = probs.shape
    # At most T sequences: a bound known without reading data keeps the function free of host synchronisation.
    cell = (sequence[:, None] * num_experts + expert).reshape(-1)
    counts = torch.zeros(t * num_experts, dtype=probs.dtype, device=probs.device)
    counts = counts.index_add(0, cell, hit.reshape(-1).to(probs.dtype)).view(t, num_experts)
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    length = torch.zeros(t, dtype=probs.dtype, device=probs.device).index_add(0, sequence, real.to(probs.dtype))
    mean_probs = sum_by_index(probs, sequence, t) / length.clamp_min(1)[:, None]
    per_sequence = num_experts * (share * mean_probs).sum(1)
    return per_sequence.sum() / (length > 0).sum().clamp_min(1)


def router_z(logits: Tensor, mask: Tensor | None = None, logsumexp: Tensor | None = None) -> Tensor:
    """Router z-loss of ST-MoE: the mean over real tokens of logsumexp(logits) squared.

    Keeps logits small, where float rounding in the softmax does little harm.

    Args:
        logits: Float[T, E].
        mask: Bool[T], real tokens.
        logsumexp: Float[T], that of `logits`, where it is known and no row of `logits` holds a NaN.

    Returns:
        Float scalar, unweighted (the paper weighs it with 1e-3). 0 where there is no real token.

    Source: arXiv:2202.08906 eq. 5.
    """
    if logsumexp is None:
        # Filled here too, so that no NaN of padding enters the gradient.
        filled = logits if mask is None else logits.masked_fill(~mask[:, None], 0.0)
        logsumexp = torch.logsumexp(filled, dim=-1)
    return masked_mean(logsumexp.square(), mask)
