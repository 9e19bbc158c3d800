"""Draws from categorical distributions without a loop or a sort."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_topk_scores(probs: Tensor) -> Tensor:
    """Random scores whose k largest entries are k draws without replacement from `probs`, the first one first.

    Each entry runs an exponential race: p / Exp(1) is largest at i with probability p_i. The ranking is that of
    log p plus Gumbel noise (the Gumbel-max trick), without logarithms of zero.

    Args:
        probs: Float[..., E], not negative; need not sum to 1.

    Returns:
        Float of the shape of `probs`, without gradient.

    Source: arXiv:1611.01144 section 2 (Gumbel-max); the race is its exponential form.
    """
    # Not in torch's default type: in bf16 the draws have few values and would tie. 1 - U is never 0, so neither is E.
    noise = -torch.log1p(-torch.rand(probs.shape, dtype=torch.float32, device=probs.device))
    return probs.detach() / noise.clamp_min(torch.finfo(torch.float32).tiny)
