"""moekit: Mixture-of-Experts training as composable PyTorch Lightning modules.

>>> import torch
>>> import moekit as mk
>>> moe = mk.MoELayer(mk.routers.switch(16, num_experts=4), mk.experts.GroupedMLP(4, 16, 64))
>>> hidden, routing = moe(torch.randn(2, 5, 16))
>>> hidden.shape
torch.Size([2, 5, 16])
"""

from lightning.pytorch.strategies import StrategyRegistry

from moekit import experts, mixing, routers
from moekit.component import Component
from moekit.dispatch import Dispatched, Dispatcher, PackedDispatcher, PaddedDispatcher
from moekit.kernels.gpu.backend import use_backend
from moekit.layer import AuxLosses, MoELayer, MoEOutput
from moekit.routing import Capacity, Router, Routing, RoutingContext, RoutingStats, routing_stats
from moekit.soft_moe import SoftMoELayer
from moekit.stepping import listen, step_end
from moekit.training.strategy import ExpertParallelStrategy

__version__ = "0.1.0"

# Lightning's own table, so that Trainer(strategy="expert_parallel") and command lines know the names.
ExpertParallelStrategy.register_strategies(StrategyRegistry)

__all__ = [
    "AuxLosses",
    "Capacity",
    "Component",
    "Dispatched",
    "Dispatcher",
    "ExpertParallelStrategy",
    "MoELayer",
    "MoEOutput",
    "PackedDispatcher",
    "PaddedDispatcher",
    "Router",
    "Routing",
    "RoutingContext",
    "RoutingStats",
    "SoftMoELayer",
    "experts",
    "listen",
    "mixing",
    "routers",
    "routing_stats",
    "step_end",
    "use_backend",
]
