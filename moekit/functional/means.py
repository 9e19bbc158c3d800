"""Means over real tokens."""

from __future__ import annotations

from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens, of which there may be none.

    Args:
        values: Float[T, ...]; padding may hold anything.
        mask: Bool[T], real tokens; None = all are real.

    Returns:
        Float[...], zeros where there is no real token.

    Example:
        >>> import torch
        >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    if mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    # Filled, not multiplied: zero times NaN is NaN.
    real = mask.view(-1, *[1] * (values.ndim - 1))
    return values.masked_fill(~real, 0).sum(0) / mask.sum().clamp_min(1)
