"""Units: which modules gather their weights together, in which type, and along which dimension ZeRO divides them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from moekit.errors import UserError
from moekit.parallel.annotation import Annotation, banks
from moekit.parallel.mesh import EXPERT, EXPERT_SHARD, SHARD, Meshes
from moekit.parallel.plan import ShardingPlan
from moekit.parallel.zero import zero_dimension
from moekit.routing import Router

# Norms of torch that refuse weights narrower than their input on some devices. Those of this package do not.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class FSDPUnit:
    """A module that gathers its weights, but for those of units inside it, in one collective.

    Attributes:
        module: The module.
        dtype: The type in which it gathers them; None = their own.
    """

    module: nn.Module
    dtype: torch.dtype | None = None


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
) -> list[FSDPUnit]:
    """Banks, what the policy wraps, what keeps another type than the modules around it, and the model; inner first.

    Args:
        model: The model.
        plan: The plan whose policy chooses modules.
        found: The annotations of its parameters.
        compute_dtype: The type in which blocks and banks gather their weights; None = their own.

    Raises:
        UserError: If an expert bank shares weights with other modules.
    """
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    sparse = set(banks(found))
    narrow = sparse | set(plan.wrap(model))
    apart = _kept_wide(narrow) if compute_dtype is not None else set()
    apart |= _of_other_precision(model)
    units = []
    for module in inner_first(model):
        if module not in narrow | apart or module is model or isinstance(module, FSDPModule):
            continue
        inside = set(module.modules())
        shared = any(not owners[parameter] <= inside for parameter in module.parameters())
        if not shared:
            units.append(FSDPUnit(module, None if module in apart else compute_dtype))
        elif module in sparse:
            raise UserError(
                f"an expert bank must not share weights with other modules: {type(module).__name__} does. Copy them."
            )
    return [*units, FSDPUnit(model)]


def _of_other_precision(model: nn.Module) -> set[nn.Module]:
    """Routers that keep float32 in a model of a lower precision: weights of one collective have one type."""
    types = {p.dtype for p in model.parameters()}
    if len(types) == 1:
        return set()
    return _with_weights(model.modules(), Router)


def _kept_wide(narrow: set[nn.Module]) -> set[nn.Module]:
    """Routers and norms in modules that gather in a lower precision."""
    return _with_weights((inner for module in narrow for inner in module.modules()), Router, *_NORMS)


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
