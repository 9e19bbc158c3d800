"""moekit: Mixture-of-Experts training as composable PyTorch Lightning modules.

>>> import torch
>>> import moekit as mk
>>> moe = mk.MoELayer(mk.routers.switch(16, num_experts=4), mk.experts.GroupedMLP(4, 16, 64))
>>> hidden, routing = moe(torch.randn(2, 5, 16))
>>> hidden.shape
torch.Size([2, 5, 16])

Names are imported when they are first used: the command line imports this package too.
"""

from typing import TYPE_CHECKING

from moekit.lazy import lazy_names
from moekit.strategy_names import register_strategy_names

if TYPE_CHECKING:
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

if not TYPE_CHECKING:  # where every name would be one
    __getattr__ = lazy_names(
        __name__,
        {
            "Component": "component",
            "ExpertParallelStrategy": "training.strategy",
            "SoftMoELayer": "soft_moe",
            "use_backend": "kernels.gpu.backend",
            **dict.fromkeys(("AuxLosses", "MoELayer", "MoEOutput"), "layer"),
            **dict.fromkeys(("Dispatched", "Dispatcher", "PackedDispatcher", "PaddedDispatcher"), "dispatch"),
            **dict.fromkeys(("Capacity", "Router", "Routing", "RoutingContext"), "routing"),
            **dict.fromkeys(("RoutingStats", "routing_stats"), "routing"),
            **dict.fromkeys(("listen", "step_end"), "stepping"),
        },
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_strategy_names()
