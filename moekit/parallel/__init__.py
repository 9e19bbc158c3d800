"""Many processes: meshes, laying a model over them, and what a layout needs.

    meshes = build_meshes(Layout(devices=8, expert_parallel_size=4), "cuda")
    sharded = parallelize(model, meshes)

For the Trainer there is `moekit.ExpertParallelStrategy`, which does this.
"""

from moekit.parallel.annotation import Annotation
from moekit.parallel.mesh import Meshes, build_meshes, check_layout
from moekit.parallel.plan import Plan, layers_of, no_layers, repeated_layers
from moekit.parallel.planner.layout import Layout
from moekit.parallel.sharding import ShardedModel, parallelize

__all__ = [
    "Annotation",
    "Layout",
    "Meshes",
    "Plan",
    "ShardedModel",
    "build_meshes",
    "check_layout",
    "layers_of",
    "no_layers",
    "parallelize",
    "repeated_layers",
]
