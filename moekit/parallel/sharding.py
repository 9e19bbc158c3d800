"""`parallelize`: lay a model over the ranks of a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moekit.dispatch import AllToAll, Exchange, TwoLevelAllToAll
from moekit.errors import UserError
from moekit.parallel.annotation import Annotation, banks, check_model, read_annotations, sparse_layers
from moekit.parallel.local import LocalView, LocalViews
from moekit.parallel.mesh import EXPERT, EXPERT_SHARD, REPLICATE, SHARD, TENSOR, Meshes
from moekit.parallel.plan import Plan
from moekit.parallel.tensor import DividedVocabulary, sum_gradient, sum_value
from moekit.parallel.zero import zero_dimension
from moekit.routers.rank_shuffle import RankShuffle
from moekit.routing import Router

_HANDLE = "_moekit_sharded"


@dataclass(frozen=True)
class ShardedModel:
    """A model that was laid over ranks; the module itself was changed in place.

    Every parameter of `module` is a DTensor, at any size of any mesh dimension.

    Attributes:
        module: the model.
        meshes: the ranks.
        plan: how axes and modules were mapped.
        annotations: the parameters that name their axes.
        units: modules that gather their weights together, innermost first; the last is the model itself.
    """

    module: nn.Module
    meshes: Meshes
    plan: Plan
    annotations: tuple[Annotation, ...]
    units: tuple[FSDPModule, ...]

    def communicate_gradients(self, enabled: bool) -> None:
        """Whether backward brings gradients together: False in all but the last micro-batch of a step.

        Without it gradients of stages 0 to 2 stay whole on each rank and nothing is sent. Stage 3, whose gradients
        must stay divided, divides them in every micro-batch and waits only with the sum over replicas.
        """
        for unit in self.units:
            if self.meshes.layout.zero_stage < 3:
                unit.set_requires_gradient_sync(enabled, recurse=False)
            else:
                unit.set_requires_all_reduce(enabled, recurse=False)

    def release_weights(self) -> None:
        """Let go of weights that were gathered for a forward which no backward followed."""
        for unit in self.units:
            unit.reshard()


def parallelize(model: nn.Module, meshes: Meshes, plan: Plan | None = None) -> ShardedModel:
    """Lay `model` over ranks, in place: experts, tensor slices, ZeRO and offload, as the meshes' layout says.

    Call it on every rank with the same model, before making optimizers. Weights and buffers are taken from rank 0.
    Afterwards the model is called as before, by ``model(...)`` (weights are gathered for a call, not for other methods
    of the outermost module): ranks of one tensor-parallel group with the same batch, all others with their own; the
    loss is a mean over the rank's batch, and gradients are means over ranks. A model whose loss is no mean over equally
    many tokens everywhere should use `moekit.parallel.global_mean`. What is divided already (by `fully_shard`, or as
    DTensors over tensor-parallel partners) stays as it is.

    Args:
        model: any module; `MoELayer`s in it send their rows to the ranks that hold their experts.
        meshes: see `build_meshes`.
        plan: see `Plan`; None = the default.

    Raises:
        UserError: before anything is sent, if the model does not fit the layout.
    """
    plan = plan or Plan()
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UserError(
            f"parallelize needs torch 2.13 or newer, whose fully_shard can sum the gradients of experts that no token "
            f"met: got torch {torch.__version__}. Everything else in moekit runs on this one."
        )
    found = read_annotations(model, plan)
    check_model(model, meshes.layout, plan, found)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"parallelize needs weights with memory: {name} is on the meta device. Call "
                "moekit.transformer.materialize(model, device) first."
            )
    theirs = [module for module in model.modules() if isinstance(module, FSDPModule)]
    units = _choose_units(model, plan, found)
    dimensions = _zero_dimensions(model, meshes, found)
    _take_from_rank_zero(model, meshes)
    _connect(model, meshes, plan, found)
    views = _divide(model, meshes, found)
    _attach(meshes, found, views, units)
    _shard(model, meshes, found, units, dimensions)
    result = ShardedModel(model, meshes, plan, tuple(found), (*theirs, *units))  # type: ignore[arg-type]
    model.__dict__[_HANDLE] = result
    return result


def sharded(model: nn.Module) -> ShardedModel | None:
    """What `parallelize` returned for `model`; None if it was not laid over ranks."""
    return model.__dict__.get(_HANDLE)


# -- what gathers its weights together ------------------------------------------------------------------------------


def _choose_units(model: nn.Module, plan: Plan, found: list[Annotation]) -> list[nn.Module]:
    """Banks, what the policy wraps, routers of another precision, and the model; inner before outer ones."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    sparse = banks(found)
    chosen = {id(module) for module in [*sparse, *plan.wrap(model), *_of_other_precision(model)]}
    units = []
    for module in reversed(list(model.modules())):
        if id(module) not in chosen or module is model or isinstance(module, FSDPModule):
            continue
        inside = {id(inner) for inner in module.modules()}
        shared = any(id(owner) not in inside for p in module.parameters() for owner in owners[id(p)])
        if not shared:
            units.append(module)
        elif any(module is bank for bank in sparse):
            raise UserError(
                f"an expert bank must not share weights with other modules: {type(module).__name__} does. Copy them."
            )
    return [*units, model]


def _of_other_precision(model: nn.Module) -> list[nn.Module]:
    """Routers that keep float32 in a model of a lower precision: weights of one collective have one type."""
    types = {p.dtype for p in model.parameters()}
    if len(types) == 1:
        return []
    return [m for m in model.modules() if isinstance(m, Router) and next(m.parameters(), None) is not None]


# -- the four steps -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _take_from_rank_zero(model: nn.Module, meshes: Meshes) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        if not isinstance(tensor, DTensor):
            # Offloaded weights are in host memory, where a GPU's process group cannot reach them.
            sent = tensor.detach().to(meshes.dense.device_type)
            dist.broadcast(sent, src=0)
            tensor.detach().copy_(sent)


def _connect(model: nn.Module, meshes: Meshes, plan: Plan, found: list[Annotation]) -> None:
    """Tell every sparse layer how to reach the ranks that hold its experts, and shuffles who has other tokens."""
    for module in model.modules():
        shuffle = getattr(module, "shuffle", None)
        if isinstance(shuffle, RankShuffle) and shuffle.group is None:
            shuffle.group = meshes.data["data_parallel"].get_group()
    if meshes.layout.expert_parallel_size > 1:
        exchange, spread = _exchange(meshes, plan), set(map(id, banks(found)))
        for _, layer in sparse_layers(model):
            if any(id(module) in spread for module in layer.experts.modules()):
                layer.connect(exchange)


def _exchange(meshes: Meshes, plan: Plan) -> Exchange:
    group = meshes.expert_group
    if plan.node_size is None or plan.node_size in (1, group.size()):
        return AllToAll(group)
    if group.size() % plan.node_size:
        raise UserError(
            f"node_size must divide expert_parallel_size: got {plan.node_size} and {group.size()}. Use None for one "
            "level."
        )
    nodes = meshes.sparse[EXPERT]._unflatten(0, (group.size() // plan.node_size, plan.node_size), ("node", "local"))
    return TwoLevelAllToAll(nodes.get_group("local"), nodes.get_group("node"))


def _divide(model: nn.Module, meshes: Meshes, found: list[Annotation]) -> list[LocalView]:
    """Make DTensors of annotated parameters, and of scalars; return how forward sees them."""
    layout, views = meshes.layout, []
    places = _places(model)
    sparse, split = set(map(id, banks(found))), {id(n.module) for n in found if TENSOR in n.divided.values()}
    for note in found:
        names: tuple[str, ...] = (EXPERT,) if id(note.module) in sparse else ()
        names += (TENSOR,) if layout.tensor_parallel_size > 1 and id(note.module) in split else ()
        if not names:
            continue
        mesh = (meshes.sparse if EXPERT in names else meshes.dense)[names]
        where = {name: dimension for dimension, name in note.divided.items()}
        placements = [Shard(where[name]) if name in where and mesh[name].size() > 1 else Replicate() for name in names]
        scale, gradient_scale, groups = 1.0, 1.0, []
        if EXPERT in names:
            gradient_scale = 1.0 / layout.expert_parallel_size
            groups += [meshes.expert_group] if EXPERT not in where else []
        if TENSOR in names and TENSOR not in where:
            if note.is_output_bias:
                scale = 1.0 / layout.tensor_parallel_size
            else:
                groups.append(meshes.tensor_group)
        spread = distribute_tensor(note.parameter.detach(), mesh, placements, src_data_rank=None)
        for owner, name in _replace(places, note.parameter, spread):
            views.append(LocalView(owner, name, scale, gradient_scale, tuple(groups)))
    for scalar in _scalars(model):  # fully_shard takes none
        mesh = meshes.data["data_parallel"]
        spread = distribute_tensor(scalar.detach(), mesh, [Replicate()], src_data_rank=None)
        for owner, name in _replace(places, scalar, spread):
            views.append(LocalView(owner, name, 1.0, 1.0 / meshes.data_size, (mesh.get_group(),)))
    return views


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 0 and not isinstance(p, DTensor)]


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every module and name under which a parameter is held; a shared one has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return places


def _replace(
    places: Mapping[int, list[tuple[nn.Module, str]]], parameter: Tensor, spread: DTensor
) -> list[tuple[nn.Module, str]]:
    """Put a divided tensor wherever a parameter is held; return where that is."""
    new = nn.Parameter(spread, requires_grad=parameter.requires_grad)
    for owner, name in places[id(parameter)]:
        owner._parameters[name] = new
    return places[id(parameter)]


def _attach(
    meshes: Meshes, found: Sequence[Annotation], views: Sequence[LocalView], units: Sequence[nn.Module]
) -> None:
    """Hooks that show local views in forward, and those of tensor-parallel layers."""
    tensor = meshes.tensor_group
    outer = {id(inner): module for module in dict.fromkeys(n.module for n in found) for inner in module.modules()}
    mine: dict[int, list[LocalView]] = {}
    holders: dict[int, nn.Module] = {}
    taken: set[int] = set()
    for unit in units:  # inner ones first: a view belongs to the innermost unit, and to the module that names the axes
        for view in views:
            inside = any(view.module is module for module in unit.modules())
            if inside and id(view) not in taken:
                taken.add(id(view))
                for holder in {id(m): m for m in (unit, outer.get(id(view.module), view.module))}.values():
                    mine.setdefault(id(holder), []).append(view)
                    holders[id(holder)] = holder
    for key, holder in holders.items():
        LocalViews(mine[key]).attach(holder)
    if tensor.size() == 1:
        return
    for module in dict.fromkeys(n.module for n in found):
        notes = [n for n in found if n.module is module]
        split = {n.axes[d] for n in notes for d, name in n.divided.items() if name == TENSOR}
        if "vocab" in split:
            module.vocabulary = DividedVocabulary(tensor)  # type: ignore[assignment]
        elif split and any("embed" in n.axes for n in notes):
            _join_partners(module, tensor)


def _join_partners(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Sum the gradients of what enters a divided layer and the values of what leaves it."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(into, args)), {name: into(value) for name, value in kwargs.items()}

    def into(value: Any) -> Any:
        return sum_gradient(value, group) if isinstance(value, Tensor) and value.requires_grad else value

    def leave(_: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"a module with a divided axis must return one tensor, the sum of its parts: {type(module).__name__} "
                f"returned {type(output).__name__}. Name its axes otherwise, or use tensor_parallel_size=1."
            )
        return sum_value(output, group)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


# -- ZeRO -----------------------------------------------------------------------------------------------------------


def _zero_dimensions(model: nn.Module, meshes: Meshes, found: list[Annotation]) -> dict[str, int]:
    """The dimension that ZeRO divides, by name of parameter.

    Raises:
        UserError: if a parameter cannot be divided.
    """
    layout = meshes.layout
    sparse, noted = set(map(id, banks(found))), {id(n.parameter): n for n in found}
    dimensions = {}
    divided = {id(p) for m in model.modules() if isinstance(m, FSDPModule) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in divided:
            continue
        note = noted.get(id(parameter))
        expert = note is not None and id(note.module) in sparse
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


def _shard(
    model: nn.Module,
    meshes: Meshes,
    found: Sequence[Annotation],
    units: Sequence[nn.Module],
    dimensions: Mapping[str, int],
) -> None:
    """Wrap every unit, inner ones first."""
    layout = meshes.layout
    sparse = set(map(id, banks(list(found))))
    placed = {id(p): Shard(dimensions[name]) for name, p in model.named_parameters() if name in dimensions}
    scalars = {p for p in model.parameters() if p.ndim == 0}
    policy = (
        CPUOffloadPolicy(pin_memory=meshes.dense.device_type == "cuda")
        if layout.offload == "parameters"
        else OffloadPolicy()
    )
    for unit in units:
        wrapped = fully_shard(
            unit,
            mesh=_data_mesh(meshes, sparse=id(unit) in sparse),
            reshard_after_forward=unit is not model and layout.zero_stage != 2,
            shard_placement_fn=lambda p: placed[id(p)],
            offload_policy=policy,
            ignored_params=scalars,
        )
        # A rank may meet no token of a kind: its zero gradients must still be summed with the others'.
        wrapped.set_reduce_scatter_unused_params(True, recurse=False)


def _data_mesh(meshes: Meshes, *, sparse: bool) -> DeviceMesh:
    """The ranks that hold the same weights: replicas, and those that divide them."""
    mesh, name = (meshes.sparse, EXPERT_SHARD) if sparse else (meshes.dense, SHARD)
    return mesh[REPLICATE, name] if mesh[REPLICATE].size() > 1 else mesh[name]
