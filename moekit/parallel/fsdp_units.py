"""Units: which modules gather their weights together, in which type; how ZeRO divides them, and what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map

from moekit.errors import UserError
from moekit.parallel.annotation import Annotation, banks
from moekit.parallel.layout import zero_dimension
from moekit.parallel.mesh import EXPERT, EXPERT_SHARD, SHARD, Meshes
from moekit.parallel.plan import ShardingPlan
from moekit.routing import Router

# Norms of torch that refuse weights narrower than their input on some devices. Those of this package do not.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def inner_first(module: nn.Module, seen: set[nn.Module] | None = None) -> Iterator[nn.Module]:
    """A module and all inside it, each once, those inside before the one around them."""
    seen = set() if seen is None else seen
    seen.add(module)
    for child in module.children():
        if child not in seen:
            yield from inner_first(child, seen)
    yield module


def choose_fsdp_units(
    model: nn.Module, plan: ShardingPlan, found: list[Annotation], compute_dtype: torch.dtype | None = None
) -> dict[nn.Module, torch.dtype | None]:
    """The units, inner ones first, and the type in which each gathers its weights; None = their own.

    A unit gathers all weights in it but those of units inside, in one collective. Units are banks, what the plan wraps
    (these two gather in `compute_dtype`), what keeps another type than the modules around it, and the model.

    Raises:
        UserError: If an expert bank shares weights with other modules.
    """
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    sparse = set(banks(found))
    narrow = sparse | set(plan.wrap(model))
    apart: set[nn.Module] = set()
    if compute_dtype is not None:  # routers and norms are not narrowed with the modules around them
        apart |= _with_weights((inner for module in narrow for inner in module.modules()), Router, *_NORMS)
    if len({p.dtype for p in model.parameters()}) > 1:  # routers kept float32; weights of one collective have one type
        apart |= _with_weights(model.modules(), Router)
    units: dict[nn.Module, torch.dtype | None] = {}
    for module in inner_first(model):
        if module not in narrow | apart or module is model or isinstance(module, FSDPModule):
            continue
        inside = set(module.modules())
        shared = any(not owners[parameter] <= inside for parameter in module.parameters())
        if not shared:
            units[module] = None if module in apart else compute_dtype
        elif module in sparse:
            raise UserError(
                f"an expert bank must not share weights with other modules: {type(module).__name__} does. Copy them."
            )
    return {**units, model: None}


def _with_weights(modules: Iterable[nn.Module], *kinds: type[nn.Module]) -> set[nn.Module]:
    return {m for m in modules if isinstance(m, kinds) and next(m.parameters(), None) is not None}


def zero_dimensions(model: nn.Module, meshes: Meshes, found: list[Annotation]) -> dict[str, int]:
    """The dimension that ZeRO divides, by name of parameter.

    Raises:
        UserError: If a parameter cannot be divided.
    """
    layout, sparse, noted = meshes.layout, set(banks(found)), {note.parameter: note for note in found}
    dimensions = {}
    divided = {p for m in model.modules() if isinstance(m, FSDPModule) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if parameter in divided:
            continue
        note = noted.get(parameter)
        expert = note is not None and note.module in sparse
        size = (meshes.sparse[EXPERT_SHARD] if expert else meshes.dense[SHARD]).size()
        shape, taken = list(parameter.shape), set()
        if isinstance(parameter, DTensor):
            shape = list(parameter.to_local().shape)
            taken = {place.dim for place in parameter.placements if isinstance(place, Shard)}
        for dimension, mesh in (note.divided if note is not None else {}).items():
            parts = layout.expert_parallel_size if mesh == EXPERT else layout.tensor_parallel_size
            shape[dimension] //= parts
            if parts > 1:
                taken.add(dimension)
        chosen = zero_dimension(shape, taken, size) if shape else 0
        if chosen is None:
            raise UserError(
                f"ZeRO stage {layout.zero_stage} must divide {name} of shape {tuple(parameter.shape)} (here "
                f"{tuple(shape)}) among {size} ranks, and no dimension is divisible. Use zero_stage=1, or a multiple."
            )
        dimensions[name] = chosen
    return dimensions


def clone_output_views(unit: nn.Module) -> None:
    """Let `unit` return copies of views. To be called before `fully_shard` wraps it.

    `fully_shard` gathers the weights for backward in a hook on every tensor that a unit returns. Writing to a view in
    place (``h += x``) gives it a new history without that hook: weights are then not there when backward asks for them.
    Tensors that are no views keep their hooks.
    """
    unit.register_forward_hook(_without_views)


def _without_views(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map(_owned, output)


def _owned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value._is_view() and value.requires_grad else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # one that is no pytree
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        owned = tree_map(_owned, held)
        return value if all(owned[name] is held[name] for name in held) else dataclasses.replace(value, **owned)
    return value
