"""Balance by coefficient of variation, and the smooth load of a noisy top-k gate (Shazeer et al.)."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.functional.ordered_sums import sum_by_index

# Noise narrower than this counts as this wide: softplus underflows to 0 where its input is very negative, and the
# probability of being chosen is a step long before.
_LEAST_SCALE = 1e-6


def squared_variation(total: Tensor) -> Tensor:
    """Squared coefficient of variation: variance / mean**2 over experts, 0 where all are equal.

    Args:
        total: Float[E], not negative.

    Returns:
        Float scalar; 0 where the mean is 0, E - 1 where one expert has everything.

    Source: arXiv:1701.06538 eq. 7 and 11. The variance is the population's, as in the authors' code.

    Example:
        >>> import torch
        >>> squared_variation(torch.tensor([2.0, 2.0, 2.0])), squared_variation(torch.tensor([3.0, 0.0, 0.0]))
        (tensor(0.), tensor(2.))
    """
    mean = total.mean()
    return (total - mean).square().mean() / mean.square().clamp_min(torch.finfo(total.dtype).tiny)


def importance_loss(weight: Tensor, expert: Tensor, num_experts: int, counted: Tensor | None = None) -> Tensor:
    """Importance loss: the squared coefficient of variation of the experts' summed weights.

    Args:
        weight: Float of any shape, combine weights of assignments.
        expert: Int64 of the same shape.
        num_experts: E.
        counted: Bool of the same shape, which assignments count (padding does not); None = all.

    Returns:
        Float scalar, unweighted (the paper weighs it with 0.1); 0 where the weights are spread evenly.

    Source: arXiv:1701.06538 eq. 6-7.
    """
    if counted is not None:
        weight = weight.masked_fill(~counted, 0.0)  # filled, not multiplied: zero times NaN is NaN
    return squared_variation(sum_by_index(weight.reshape(-1), expert.reshape(-1), num_experts))


def selection_probability(clean: Tensor, noisy: Tensor, scale: Tensor, k: int) -> Tensor:
    """Probability that a noisy top-k gate chooses an expert if only that expert's noise is drawn anew.

    P(x, i) = Phi((clean_i - threshold_i) / scale_i), where threshold_i is the k-th largest noisy score of the other
    experts, and Phi the normal distribution function. Where the number of chosen experts jumps, this is smooth, so
    the load gets a gradient.

    Args:
        clean: Float[T, E], scores without noise.
        noisy: Float[T, E], scores with noise.
        scale: Float[T, E], standard deviation of the noise, not negative.
        k: choices per token.

    Returns:
        Float[T, E], in [0, 1]; ones where k = E.

    Source: arXiv:1701.06538 eq. 8-9. Differs: a scale below 1e-6 counts as 1e-6 (the authors' code adds 1e-2 to
        every scale).
    """
    if k >= clean.shape[-1]:
        return torch.ones_like(clean)
    top, index = noisy.topk(k + 1, dim=-1)
    chosen = torch.zeros_like(clean, dtype=torch.bool).scatter(-1, index[..., :k], True)
    # Without a chosen expert the k-th of the others is the first that was not chosen; else it is the last chosen.
    threshold = torch.where(chosen, top[..., k:], top[..., k - 1 : k])
    return torch.special.ndtr((clean - threshold) / scale.clamp_min(_LEAST_SCALE))


def load_loss(clean: Tensor, noisy: Tensor, scale: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """Load loss: the squared coefficient of variation of the experts' expected number of tokens.

    Load_i = sum over the real tokens, which ``mask`` Bool[T] names, of `selection_probability`, whose arguments are the
    others. A float scalar, unweighted (the paper weighs it with 0.1).

    Source: arXiv:1701.06538 eq. 8-11. Differs: eq. 11 prints CV(L_load); the text means the CV of Load, as here.
    """
    if mask is None:
        return squared_variation(selection_probability(clean, noisy, scale, k).sum(0))
    padding = ~mask[:, None]
    # Before, so that no NaN of padding enters a gradient; and after, because padding is nobody's load.
    probability = selection_probability(
        clean.masked_fill(padding, 0.0), noisy.masked_fill(padding, 0.0), scale.masked_fill(padding, 1.0), k
    )
    return squared_variation(probability.masked_fill(padding, 0.0).sum(0))
