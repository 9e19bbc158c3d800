"""Expert banks: E networks of one shape, held and computed together."""

from moekit.experts.base import Experts, copy_first_expert_, is_expert_bank
from moekit.experts.base_layers import BASELayerStack
from moekit.experts.dense_pretraining import AddNoise, DensePretraining, MaskWeights
from moekit.experts.fine_grained import FineGrained, fine_grained
from moekit.experts.gate_up import ClampedGate, Gate, GateUpExperts, HalvesGate
from moekit.experts.grouped import GroupedGLU, GroupedMLP
from moekit.experts.multi_hash import MultiHashMLP
from moekit.experts.zero_computation import ZeroComputationExperts

__all__ = [
    "AddNoise",
    "BASELayerStack",
    "ClampedGate",
    "DensePretraining",
    "Experts",
    "FineGrained",
    "Gate",
    "GateUpExperts",
    "GroupedGLU",
    "GroupedMLP",
    "HalvesGate",
    "MaskWeights",
    "MultiHashMLP",
    "ZeroComputationExperts",
    "copy_first_expert_",
    "fine_grained",
    "is_expert_bank",
]
