"""What routing does beside the loss, computed from a trace: load, drops, information, co-activation, saturation."""

from moekit.mechanisms.gradients import expert_gradients
from moekit.mechanisms.information import MutualInformation, mutual_information
from moekit.mechanisms.measured import LABELS, LayerMechanisms, Mechanisms, mechanisms
from moekit.mechanisms.quantities import active_experts, coactivation, drops_by_place, effective_experts, saturation

__all__ = [
    "LABELS",
    "LayerMechanisms",
    "Mechanisms",
    "MutualInformation",
    "active_experts",
    "coactivation",
    "drops_by_place",
    "effective_experts",
    "expert_gradients",
    "mechanisms",
    "mutual_information",
    "saturation",
]
