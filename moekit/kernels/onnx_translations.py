"""Products by expert in ONNX, which knows none: slices of the rows, one product each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` needs to write sparse layers: give it as ``custom_translation_table``.

    The graph holds one product for each expert, over the rows of that expert alone.

    Raises:
        ModuleNotFoundError: if onnxscript is not installed (``pip install "moekit[onnx]"``).
    """
    from onnxscript import opset18 as op

    def grouped_mm(x: Any, weight: Any, counts: Any) -> Any:
        ends = op.CumSum(counts, op.Constant(value_int=0))
        starts, rows = op.Sub(ends, counts), op.Constant(value_ints=[0])
        blocks = []
        for e in range(weight.shape[0]):
            number = op.Constant(value_ints=[e])
            block = op.Slice(x, op.Gather(starts, number), op.Gather(ends, number), rows)
            blocks.append(op.MatMul(block, op.Squeeze(op.Gather(weight, number), rows)))
        return op.Concat(*blocks, axis=0)

    return {torch.ops.moekit.grouped_mm.default: grouped_mm}
