"""First draws of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def truncated_normal_(weight: Tensor, fan_in: int, scale: float) -> None:
    """Fill with a normal of std sqrt(scale / fan_in), draws beyond two of them repeated; nothing on the meta device.

    sqrt(scale / fan_in) is the standard deviation before the cut, as in the paper's sentence and in the authors' code
    (Mesh-TensorFlow's `VarianceScalingInitializer`). That of the weights is 0.88 times as large, their variance 0.774
    times scale / fan_in.

    Source: arXiv:2101.03961 section 2.4 (scale 0.1 instead of the usual 1.0). Differs: initialisers named
    "variance_scaling" of Flax and Keras divide by 0.88 first, so that scale / fan_in is the variance after the cut.
    """
    if weight.device.type != "meta":
        std = (scale / fan_in) ** 0.5
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
