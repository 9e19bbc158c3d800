"""`torch.nn.functional.grouped_mm` as its CUDA kernel is: what it takes, and what it leaves unwritten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._meta_registrations import _meta_grouped_mm_common


def grouped_mm_as_kernel(
    x: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """`aten::_grouped_mm`, after the checks of its CUDA form.

    What stands behind the last offset, and the products of empty groups, is not written by the kernels: it is NaN here.
    """
    assert offs is not None

    def shape(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    _meta_grouped_mm_common(shape(x), shape(weight), None, None, offs=shape(offs), bias=bias, out_dtype=out_dtype)
    for tensor in (x, weight):
        if tensor.storage_offset() * tensor.element_size() % 16:
            raise RuntimeError(
                f"grouped_mm needs data aligned to 16 bytes: got an offset of {tensor.storage_offset()}."
            )
    counts = torch.diff(offs, prepend=offs.new_zeros(1)).tolist()
    if weight.dim() == 3:
        blocks = [block.float() @ one.float() for block, one in zip(_blocks(x, counts, 0), weight, strict=True)]
        out = torch.full((x.shape[0], weight.shape[2]), torch.nan, dtype=x.dtype)
        out[: sum(counts)] = torch.cat(blocks).to(x.dtype)
        return out
    products = []
    for left, right in zip(_blocks(x, counts, 1), _blocks(weight, counts, 0), strict=True):
        unwritten = torch.full((x.shape[0], weight.shape[1]), torch.nan)
        products.append(left.float() @ right.float() if right.shape[0] else unwritten)
    return torch.stack(products).to(x.dtype)


def _blocks(tensor: Tensor, counts: Sequence[int], dim: int) -> Sequence[Tensor]:
    return tensor.narrow(dim, 0, sum(counts)).split(list(counts), dim)
