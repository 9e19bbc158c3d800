"""Layer norm and RMS norms whose statistics are float32 whatever the precision around them.

Torch's kernels see to that themselves where input and weights have one type (bf16 through and through); where they
differ (bf16 activations, float32 weights) both are widened.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.functional.eager import is_eager


def _wide(x: Tensor) -> Tensor:
    """`x` in float32, or in its own type where that is wider; no copy where nothing changes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _beside(x: Tensor, weight: Tensor) -> Tensor:
    """`x` as it is where `weight` has its type, else wide."""
    return x if x.dtype == weight.dtype else _wide(x)


def _is_quick(x: Tensor, weight: Tensor) -> bool:
    """Whether `_quick_rms_norm` may be taken: on a CPU, without gradients, of numbers that are squared as they are."""
    if torch.is_grad_enabled() or not is_eager():
        return False
    plain = type(x) is Tensor and type(weight) is nn.Parameter
    return plain and x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)


def _quick_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm`, for which torch has no kernel on a CPU, by half as many operations."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.addcmul(_scalar(eps, x.dtype), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * inverse).mul_(weight)


@cache
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")


class LayerNorm(nn.Module):
    """Layer norm, (x - mean) / sqrt(variance + eps) * weight + bias, over the last dimension.

    Args:
        dim: D.
        eps: added to the variance.

    Source: arXiv:1607.06450 eq. 3. Differs: mean and variance are float32 under bf16 too; the result has the type
    of the input.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {"weight": ("embed",), "bias": ("embed",)}

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Become the identity after normalising."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise Float[..., D]."""
        wide = _beside(x, self.weight)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, weight.shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm, x / sqrt(mean(x^2) + eps) * weight, over the last dimension: no mean, no bias.

    Args:
        dim: D.
        eps: added to the mean square.

    Source: arXiv:1910.07467 eq. 4; the norm of T5 (arXiv:1910.10683 section 2.1). Differs: as `LayerNorm`.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {"weight": ("embed",)}

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Become the identity after normalising."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise Float[..., D]."""
        if _is_quick(x, self.weight):
            return _quick_rms_norm(x, self.weight, self.eps)
        wide = _beside(x, self.weight)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class RMSNormWithoutScale(nn.Module):
    """Root-mean-square norm without the learned scale, x / sqrt(mean(x^2) + eps), over the last dimension.

    Args:
        dim: D; taken for interchange with the other norms, this one has no weights.
        eps: added to the mean square.

    Source: the arm "remove RMSNorm scale" of the stability study in arXiv:2202.08906 section 3: stable in all runs, and
        worse (-2.020 against -1.755 in negative log perplexity). Differs: as `LayerNorm`.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise Float[..., D]."""
        return F.rms_norm(_wide(x), (self.dim,), None, self.eps).to(x.dtype)
