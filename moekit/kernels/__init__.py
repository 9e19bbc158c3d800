"""Fused paths, each with its reference and its backward in one file."""

from moekit.kernels.balanced_assignment import balanced_assignment
from moekit.kernels.grouped_mm import grouped_mm, grouped_mm_reference
from moekit.kernels.grouped_rows import repeat_rows
from moekit.kernels.host_counts import on_host, remember, split_counts
from moekit.kernels.onnx_translations import onnx_translations
from moekit.kernels.vocabulary_loss import TokenLoss, logits_loss, vocabulary_loss, vocabulary_loss_reference

__all__ = [
    "TokenLoss",
    "balanced_assignment",
    "grouped_mm",
    "grouped_mm_reference",
    "logits_loss",
    "on_host",
    "onnx_translations",
    "remember",
    "repeat_rows",
    "split_counts",
    "vocabulary_loss",
    "vocabulary_loss_reference",
]
