"""Many processes: meshes, sharding a model over them, and checkpoints for any layout.

    meshes = build_meshes(Layout(devices=8, expert_parallel_size=4), "cuda")
    sharded = parallelize(model, meshes)

For the Trainer there is `moekit.ExpertParallelStrategy`, which does this.
"""

from moekit.parallel.activations import Activations
from moekit.parallel.annotation import Annotation, read_annotations
from moekit.parallel.checkpoint import (
    Checkpointer,
    consolidate,
    export_safetensors,
    gather_state_dict,
    import_safetensors,
    is_checkpoint,
    remove_checkpoint,
    verify_checkpoint,
)
from moekit.parallel.gradients import clip_by_norm, clip_by_value, global_mean, global_weights, gradient_norm
from moekit.parallel.layout import Layout
from moekit.parallel.master_weights import MasterWeights, model_parameter
from moekit.parallel.mesh import Meshes, World, build_meshes
from moekit.parallel.optimizer_rebinding import rebind_optimizer
from moekit.parallel.plan import ShardingPlan, layers_of, no_layers, repeated_layers
from moekit.parallel.sharding import ShardedModel, parallelize, sharded

__all__ = [
    "Activations",
    "Annotation",
    "Checkpointer",
    "Layout",
    "MasterWeights",
    "Meshes",
    "ShardedModel",
    "ShardingPlan",
    "World",
    "build_meshes",
    "clip_by_norm",
    "clip_by_value",
    "consolidate",
    "export_safetensors",
    "gather_state_dict",
    "global_mean",
    "global_weights",
    "gradient_norm",
    "import_safetensors",
    "is_checkpoint",
    "layers_of",
    "model_parameter",
    "no_layers",
    "parallelize",
    "read_annotations",
    "rebind_optimizer",
    "remove_checkpoint",
    "repeated_layers",
    "sharded",
    "verify_checkpoint",
]
