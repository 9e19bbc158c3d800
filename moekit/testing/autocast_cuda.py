"""What ``torch.autocast("cuda")`` does to operators, for tensors that only say that they are on a GPU.

Torch's own goes by the device that C++ sees. The lists are those of its documentation (Autocast Op Reference, CUDA), as
far as moekit and torch.nn call them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_LOWER = set(
    """linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm addbmm addmv mv einsum conv1d conv2d conv3d lstm
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell prelu chain_matmul multi_head_attention_forward
    scaled_dot_product_attention""".split()  # noqa: SIM905
)
_FLOAT32 = set(
    """softmax log_softmax softmin layer_norm group_norm nll_loss cross_entropy kl_div l1_loss smooth_l1_loss mse_loss
    binary_cross_entropy_with_logits cosine_similarity exp expm1 log log10 log1p log2 pow __pow__ rpow rsqrt reciprocal
    sum prod cumsum cumprod norm dist cdist logsumexp softplus acos asin cosh sinh tan erfinv renorm""".split()  # noqa: SIM905
)
_WIDEST = set("cat stack addcdiv addcmul bilinear cross dot vdot tensordot atan2 scatter_add".split())  # noqa: SIM905


class AutocastCUDA(TorchFunctionMode):
    """Casts the arguments of operators while ``torch.autocast("cuda")`` is on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with arguments in the type that autocast gives it."""
        kwargs = dict(kwargs or {})
        if torch.is_autocast_enabled("cuda"):
            dtype = _dtype(getattr(func, "__name__", ""), args, kwargs)
            if dtype is not None:
                args, kwargs = tree_map(lambda leaf: leaf.to(dtype) if _casts(leaf) else leaf, (args, kwargs))
        return func(*args, **kwargs)


def _casts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cuda and leaf.is_floating_point() and leaf.dtype != torch.float64


def _dtype(name: str, args: Any, kwargs: Any) -> torch.dtype | None:
    if name in _LOWER:
        return torch.get_autocast_dtype("cuda")
    if name in _FLOAT32:
        return torch.float32 if kwargs.get("dtype") is None else None
    if name in _WIDEST:
        found = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if _casts(leaf)}
        return torch.float32 if torch.float32 in found else None
    return None
