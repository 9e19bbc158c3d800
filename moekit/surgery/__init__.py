"""Changing models between runs: fewer experts, more of them, other ones; pure functions on modules and state dicts.

    layers = sparse_layers(model)
    kept = choose_experts(layers, keep=0.5, order="utilisation", load=load)
    smaller = take_experts(model.state_dict(), layers, kept)

The commands of ``moekit`` do it to the runs of recipes, on disk.
"""

from moekit.surgery.adapters import add_adapters, merge_adapters, merged_state
from moekit.surgery.aggregation import aggregate
from moekit.surgery.compensation import compensate, compensations
from moekit.surgery.optimizer_state import carry_state, parameter_names, state_by_name, state_by_number
from moekit.surgery.pruning import choose_experts, count_kept, parse_amount, take_experts
from moekit.surgery.saliency import ExpertUse, expert_use, watch_experts
from moekit.surgery.segmentation import split_experts
from moekit.surgery.sparse_layer import SparseLayer, require_separable, sparse_layers
from moekit.surgery.student import choose_layers, initialize_student
from moekit.surgery.upcycling import dense_names, merge, require_complete, upcycle

__all__ = [
    "ExpertUse",
    "SparseLayer",
    "add_adapters",
    "aggregate",
    "carry_state",
    "choose_experts",
    "choose_layers",
    "compensate",
    "compensations",
    "count_kept",
    "dense_names",
    "expert_use",
    "initialize_student",
    "merge",
    "merge_adapters",
    "merged_state",
    "parameter_names",
    "parse_amount",
    "require_complete",
    "require_separable",
    "sparse_layers",
    "split_experts",
    "state_by_name",
    "state_by_number",
    "take_experts",
    "upcycle",
    "watch_experts",
]
