"""Several projections of one input, held in one tensor and computed by one product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """P linear maps of the same input: queries, keys and values, or the two halves of a gated feed-forward.

    The maps have an axis of their own, so that their outputs can be divided among processes: half of a plain
    ``[3 * D, D]`` matrix would be the queries and half of the keys.

    Args:
        parts: P.
        in_features: size of the input.
        out_features: size of each output.
        bias: whether there are biases.
    """

    def __init__(self, parts: int, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.parts, self.in_features, self.out_features = parts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(parts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(parts, out_features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Linear` does."""
        bound = self.in_features**-0.5
        for tensor in self.parameters():
            if not tensor.is_meta:
                nn.init.uniform_(tensor, -bound, bound)

    def extra_repr(self) -> str:  # noqa: D102
        return f"parts={self.parts}, in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, x: Tensor) -> Tensor:
        """Float[..., in_features] -> Float[..., P, out_features]."""
        bias = None if self.bias is None else self.bias.flatten()
        return F.linear(x, self.weight.flatten(0, 1), bias).unflatten(-1, (self.weight.shape[0], -1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Checkpoints of earlier versions hold the maps below each other.
        for name, parameter in self.named_parameters(recurse=False):
            found = state_dict.get(prefix + name)
            if found is not None and found.ndim == parameter.ndim - 1:
                state_dict[prefix + name] = found.unflatten(0, (self.parts, -1))
        super()._load_from_state_dict(state_dict, prefix, *args)


def projection(maps: int, in_features: int, out_features: int, *, bias: bool) -> nn.Linear | FusedLinear:
    """A plain linear map, or `FusedLinear` for several."""
    if maps == 1:
        return nn.Linear(in_features, out_features, bias=bias)
    return FusedLinear(maps, in_features, out_features, bias=bias)
