"""Expert banks: E networks of one shape, held and computed together."""

from moekit.experts.base import Experts
from moekit.experts.grouped import GroupedGLU, GroupedMLP

__all__ = ["Experts", "GroupedGLU", "GroupedMLP"]
