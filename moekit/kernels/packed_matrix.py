"""A matrix that few rows are multiplied by again and again, laid out once for the CPU's product.

A product by a matrix of many rows, as the scores of a vocabulary are, lays blocks of it out anew in every call. For the
few rows of a step of decoding this takes longer than the product: 32 rows by 8,000 x 256 took 3.0 ms, and 1.7 by the
packed matrix; packing took 2.6.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.functional.eager import is_eager

_LEAST_NUMBERS = 1 << 16  # below, a call takes longer than what it multiplies
_MOST_NUMBERS = 1 << 26  # of a matrix that is kept a second time: 256 MB


def project_reference(x: Tensor, weight: Tensor) -> Tensor:
    """What `PackedMatrix` computes: Float[..., N] of ``x`` Float[..., D] by ``weight`` Float[N, D]."""
    return F.linear(x, weight)


def can_pack(x: Tensor, weight: Tensor) -> bool:
    """Whether `PackedMatrix` computes ``x`` Float[..., D] by ``weight`` Float[N, D].

    On an x86 CPU in float32, where nobody wants gradients or casts; a matrix that is large, and not so large that it
    must not be kept twice.
    """
    if torch.is_grad_enabled() or not is_eager() or torch.is_autocast_enabled("cpu"):
        return False
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and x.numel() > 0
    large = _LEAST_NUMBERS <= weight.numel() <= _MOST_NUMBERS
    floats = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return plain and large and floats and _is_here()


def _is_here() -> bool:
    """Whether the machine profits from the operations, nobody has switched them off, and they work."""
    return bool(torch.backends.mkldnn.enabled) and _works()


@cache
def _works() -> bool:
    """Whether this torch has the operations, and they compute a small product right.

    It keeps them for its compiler, and may change them with any release.
    """
    if not (torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()):
        return False
    if not (hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.arange(16 * 24, dtype=torch.float32, device="cpu").sin_().view(16, 24)
        x = weight[3:8] * 2
        try:
            expected = project_reference(x, weight)
            error = float((PackedMatrix(weight)(x) - expected).norm() / expected.norm())
            wrong = "" if error < 0.02 else f"a product is off by {error:.1e} of its size"  # in bf16 it may be
        except Exception as caught:  # whatever other arguments or a missing kernel raise
            wrong = f"{type(caught).__name__}: {caught}"
    if wrong:
        warnings.warn(
            f"torch {torch.__version__} multiplies by packed matrices in another way than moekit expects: {wrong}. "
            "Logits are computed without them, somewhat slower and otherwise the same.",
            stacklevel=2,
        )
    return not wrong


class PackedMatrix:
    """A copy of ``weight`` Float[N, D] as oneDNN wants it; what changes in the weight later is not in it.

    To be made and called only where `can_pack` says so.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        """Float[..., N] of ``x`` Float[..., D]: `project_reference` up to rounding."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed, None, "none", [], "")
        return out
