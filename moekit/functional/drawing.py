"""First draws of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def truncated_normal_(weight: Tensor, fan_in: int, scale: float) -> None:
    """Fill with a normal of std sqrt(scale / fan_in), cut at two standard deviations; nothing on the meta device.

    Source: arXiv:2101.03961 section 2.4 (scale 0.1 instead of the usual 1.0).
    """
    if weight.device.type != "meta":
        std = (scale / fan_in) ** 0.5
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
