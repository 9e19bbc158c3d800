"""Pure tensor functions: losses, queues, and the slow obvious reference. Imports torch only."""

from moekit.functional.assignment import queue_positions, service_order
from moekit.functional.dropout import dropout
from moekit.functional.losses import BalanceScope, load_balance, router_z
from moekit.functional.reference import moe_reference

__all__ = ["BalanceScope", "dropout", "load_balance", "moe_reference", "queue_positions", "router_z", "service_order"]
