"""Pure tensor functions: losses, queues, and the slow obvious reference. Imports torch only."""

from moekit.functional.assignment import queue_positions, service_order
from moekit.functional.balanced_assignment import balanced_assignment
from moekit.functional.dropout import dropout
from moekit.functional.importance import importance, load, selection_probability, squared_variation
from moekit.functional.losses import BalanceScope, load_balance, router_z
from moekit.functional.precision import wide_linear, without_autocast
from moekit.functional.reference import moe_reference
from moekit.functional.sampling import race
from moekit.functional.sinkhorn import sinkhorn

__all__ = [
    "BalanceScope",
    "balanced_assignment",
    "dropout",
    "importance",
    "load",
    "load_balance",
    "moe_reference",
    "queue_positions",
    "race",
    "router_z",
    "selection_probability",
    "service_order",
    "sinkhorn",
    "squared_variation",
    "wide_linear",
    "without_autocast",
]
