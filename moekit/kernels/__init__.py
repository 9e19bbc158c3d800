"""Fused paths; each is a custom op with its reference and its backward in one file."""

from moekit.kernels.balanced_assignment import balanced_assignment
from moekit.kernels.grouped_mm import grouped_mm, grouped_mm_reference

__all__ = ["balanced_assignment", "grouped_mm", "grouped_mm_reference"]
