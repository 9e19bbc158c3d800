"""Changing models between runs: fewer experts, more of them, other ones; pure functions on modules and state dicts.

    layers = sparse_layers(model)
    kept = choose_experts(layers, keep=0.5, order="utilisation", load=load)
    smaller = take_experts(model.state_dict(), layers, kept)

``python -m moekit.surgery`` does it to the runs of recipes, on disk.
"""

from moekit.surgery.adapters import add_adapters, merge_adapters, merged_state
from moekit.surgery.aggregation import aggregate
from moekit.surgery.anatomy import SparseLayer, require_operable, sparse_layers
from moekit.surgery.compensation import compensate, compensations
from moekit.surgery.inheritance import choose_layers, inherit
from moekit.surgery.optimizer_state import by_name, by_number, carry, parameter_names
from moekit.surgery.selection import choose_experts, count_kept
from moekit.surgery.splitting import split_experts
from moekit.surgery.taking import take_experts
from moekit.surgery.upcycling import dense_names, merge, require_complete, upcycle

__all__ = [
    "SparseLayer",
    "add_adapters",
    "aggregate",
    "by_name",
    "by_number",
    "carry",
    "choose_experts",
    "choose_layers",
    "compensate",
    "compensations",
    "count_kept",
    "dense_names",
    "inherit",
    "merge",
    "merge_adapters",
    "merged_state",
    "parameter_names",
    "require_complete",
    "require_operable",
    "sparse_layers",
    "split_experts",
    "take_experts",
    "upcycle",
]
