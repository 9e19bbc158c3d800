"""Many processes: meshes, laying a model over them, and what a layout needs.

    meshes = build_meshes(Layout(devices=8, expert_parallel_size=4), "cuda")
    sharded = parallelize(model, meshes)

For the Trainer there is `moekit.ExpertParallelStrategy`, which does this.
"""

from moekit.parallel.annotation import Annotation
from moekit.parallel.gradients import clip_by_norm, clip_by_value, global_mean, gradient_norm
from moekit.parallel.mesh import Meshes, World, build_meshes, check_layout
from moekit.parallel.plan import Plan, layers_of, no_layers, repeated_layers
from moekit.parallel.planner.layout import Layout
from moekit.parallel.shadows import Shadows, original
from moekit.parallel.sharding import ShardedModel, parallelize, sharded

__all__ = [
    "Annotation",
    "Layout",
    "Meshes",
    "Plan",
    "Shadows",
    "ShardedModel",
    "World",
    "build_meshes",
    "check_layout",
    "clip_by_norm",
    "clip_by_value",
    "global_mean",
    "gradient_norm",
    "layers_of",
    "no_layers",
    "original",
    "parallelize",
    "repeated_layers",
    "sharded",
]
