"""Pure tensor functions: losses, queues, and the slow obvious reference. Imports torch only."""

from moekit.functional.assignment import queue_positions, service_order
from moekit.functional.balanced_assignment import balanced_assignment
from moekit.functional.dropout import dropout
from moekit.functional.importance import importance_loss, load_loss, selection_probability, squared_variation
from moekit.functional.losses import BalanceScope, load_balance, router_z
from moekit.functional.precision import float32_linear, without_autocast
from moekit.functional.reference import moe_reference
from moekit.functional.sampling import gumbel_topk_scores
from moekit.functional.sinkhorn import sinkhorn

__all__ = [
    "BalanceScope",
    "balanced_assignment",
    "dropout",
    "float32_linear",
    "gumbel_topk_scores",
    "importance_loss",
    "load_balance",
    "load_loss",
    "moe_reference",
    "queue_positions",
    "router_z",
    "selection_probability",
    "service_order",
    "sinkhorn",
    "squared_variation",
    "without_autocast",
]
