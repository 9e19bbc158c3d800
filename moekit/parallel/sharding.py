"""`parallelize`: shard a model over the ranks of a layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.utils.weak import WeakTensorKeyDictionary

from moekit.dispatch import AllToAll, Exchange, TwoLevelAllToAll
from moekit.errors import UserError
from moekit.layer import moe_layers
from moekit.mapped import StoredWeights
from moekit.parallel.activations import Activations
from moekit.parallel.annotation import Annotation, banks, check_model, read_annotations
from moekit.parallel.fsdp_units import choose_fsdp_units, clone_output_views, inner_first, zero_dimensions
from moekit.parallel.local_views import LocalView, LocalViews
from moekit.parallel.mesh import EXPERT, EXPERT_SHARD, REPLICATE, SHARD, TENSOR, Meshes, unflatten
from moekit.parallel.plan import ShardingPlan
from moekit.parallel.tensor_parallel import VocabParallel, sum_gradient, sum_value
from moekit.parallel.unused_gradients import parameter_groups, reduce_unused_gradients
from moekit.routers.rank_shuffle import RankShuffle

_HANDLE = "_moekit_sharded"


@dataclass(frozen=True)
class ShardedModel:
    """A model that was sharded over ranks; the module itself was changed in place.

    Every parameter of `module` is a DTensor, at any size of any mesh dimension.

    Attributes:
        module: The model.
        meshes: The ranks.
        units: The modules that gather their weights together, innermost first; the last is the model itself.
        replaced: The parameters that took the place of others, by these, as long as somebody holds them.
    """

    module: nn.Module
    meshes: Meshes
    units: tuple[FSDPModule, ...]
    replaced: WeakTensorKeyDictionary

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

    def gather_again(self) -> None:
        """Let the model, in the middle of its forward, compute again with what a backward or a step left behind.

        Backward lets go of the weights that the model itself gathered when its forward began. Inner units gather theirs
        whenever they are called. All ranks must call it together.
        """
        self.units[-1].unshard()
        for group in parameter_groups(self.units[-1]):
            for parameter in group.fsdp_params:
                # An optimizer may have been toggled since they were gathered.
                parameter._unsharded_param.requires_grad_(parameter.sharded_param.requires_grad)
        for hook in self.module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, LocalViews):
                owner.renew()

    def join_backward(self, loss: Tensor) -> None:
        """Let the backward of `loss`, which follows, bring together the gradients of the whole model.

        `fully_shard` learns of a backward by what the forward of a unit has returned. A backward in the middle of the
        model's own forward, which has returned nothing yet, may meet no other unit.
        """
        state: Any = fully_shard.state(self.units[-1])  # type: ignore[attr-defined]
        if loss.requires_grad:  # else backward says what is wrong
            loss.register_hook(state._pre_backward)

    def forget_gradients(self) -> None:
        """Drop the gradients that wait for the last micro-batch of a step, where that was never taken.

        They are not those of the parameters, so that no ``zero_grad`` reaches them.
        """
        for unit in self.units:
            for group in parameter_groups(unit):
                group._partial_reduce_output = None
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = None
                    if (whole := getattr(parameter, "_unsharded_param", None)) is not None:
                        whole.grad = None

    def end_without_backward(self) -> None:
        """Do what a backward does at its end, after a forward that none follows: in one process alone.

        Gradients of earlier micro-batches are brought to their parameters, and weights are released, which the step
        that follows changes.
        """
        state: Any = fully_shard.state(self.units[-1])  # type: ignore[attr-defined]
        with torch.no_grad():
            state._root_post_backward_final_callback()

    def release_weights(self) -> None:
        """Let go of weights that were gathered for a forward which no backward followed."""
        for unit in self.units:
            unit.reshard()


def parallelize(
    model: nn.Module,
    meshes: Meshes,
    plan: ShardingPlan | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    weights: Iterable[nn.Module] | None = None,
) -> ShardedModel:
    """Shard `model` over ranks, in place: experts, tensor slices, ZeRO and offload, as the meshes' layout says.

    Call it on every rank with the same model, before making optimizers. Weights and buffers are taken from rank 0.
    Afterwards the model is called as before, by ``model(...)`` (weights are gathered for a call, not for other methods
    of the outermost module): ranks of one tensor-parallel group with the same batch, all others with their own; the
    loss is a mean over the rank's batch, and gradients are means over ranks. A model whose loss is no mean over equally
    many tokens everywhere should use `moekit.parallel.global_mean`. What is divided already (by `fully_shard`, or as
    DTensors over tensor-parallel partners) stays as it is.

    Args:
        model: Any module; `MoELayer`s in it send their rows to the ranks that hold their experts.
        meshes: The meshes of the ranks, from `build_meshes`.
        plan: Which axes are divided and which modules gather together; None = the default.
        compute_dtype: The type in which blocks and expert banks gather their weights, for mixed precision by autocast
            (torch.bfloat16): nobody then converts whole weights again and keeps them until backward. Gradients are
            summed in the weights' own type. Routers, and norms that need it, keep their type, and so does what belongs
            to no block: embeddings enter the residual stream in full. None = the type of the weights.
        weights: For a model on the meta device, an iterable that gives modules their weights and yields each, inner
            ones first, as `moekit.transformer.materialize_modules` does. Each block is divided before the next one is
            drawn, so that no rank ever holds the whole model. Modules with `stored_weights`
            (`moekit.mapped.StoredWeights`) are filled when all is divided, by each rank for itself.

    The model's state dict is divided too, and `copy.deepcopy` refuses it: `moekit.parallel.gather_state_dict` gives a
    whole one, which a model that is not parallelized loads.

    Raises:
        UserError: Before anything is sent, if the model does not fit the layout.
    """
    plan = plan or ShardingPlan()
    found = read_annotations(model, plan)
    check_model(model, meshes.layout, plan, found)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and weights is None:
            raise UserError(
                f"parallelize needs weights with memory: {name} is on the meta device. Use "
                "weights=moekit.transformer.materialize_modules(model, device)."
            )
    before = WeakTensorKeyDictionary({p: name for name, p in model.named_parameters(remove_duplicate=False)})
    theirs = [module for module in model.modules() if isinstance(module, FSDPModule)]
    units = choose_fsdp_units(model, plan, found, compute_dtype)
    dimensions = zero_dimensions(model, meshes, found)
    slices = _slices(model, meshes, found)
    _connect(model, meshes, plan, found)
    _attach(meshes, found, slices, units)
    sharder = _Sharder(model, meshes, found, slices, dimensions)
    waiting = dict(units)
    for module in weights if weights is not None else inner_first(model):
        if module in waiting:
            sharder.shard(module, waiting.pop(module))
    for module, stored in StoredWeights.roots(model):
        stored.fill(module)
    now = dict(model.named_parameters(remove_duplicate=False))
    replaced = WeakTensorKeyDictionary({p: now[name] for p, name in before.items() if p is not now[name]})
    result = ShardedModel(model, meshes, (*theirs, *units), replaced)  # type: ignore[arg-type]
    model.__dict__[_HANDLE] = result
    model.__dict__["__deepcopy__"] = _refuse_to_copy
    return result


def _refuse_to_copy(memo: Any) -> NoReturn:
    raise TypeError(
        "a model that is divided over processes cannot be copied by deepcopy: build another one, and load "
        "moekit.parallel.gather_state_dict(model) into it, which all processes call together."
    )


def sharded(model: nn.Module) -> ShardedModel | None:
    """What `parallelize` returned for `model`; None if it was not sharded."""
    return model.__dict__.get(_HANDLE)


# -- before the weights are there --------------------------------------------------------------------------------------


def _connect(model: nn.Module, meshes: Meshes, plan: ShardingPlan, found: list[Annotation]) -> None:
    """Tell sparse layers how to reach the ranks that hold their experts, shuffles and annotations who the ranks are."""
    for module in model.modules():
        if isinstance(module, Activations):
            module.connect(meshes)
        shuffle = getattr(module, "shuffle", None)
        if isinstance(shuffle, RankShuffle) and shuffle.group is None:
            shuffle.group = meshes.data["data_parallel"].get_group()
    if meshes.layout.expert_parallel_size > 1:
        exchange, divided = _exchange(meshes, plan), set(banks(found))
        for _, layer in moe_layers(model):
            if not divided.isdisjoint(layer.experts.modules()):
                layer.connect(exchange)


def _exchange(meshes: Meshes, plan: ShardingPlan) -> Exchange:
    group = meshes.expert_group
    if plan.node_size is None or plan.node_size in (1, group.size()):
        return AllToAll(group)
    if group.size() % plan.node_size:
        raise UserError(
            f"node_size must divide expert_parallel_size: got {plan.node_size} and {group.size()}. Use None for one "
            "level."
        )
    shape = (group.size() // plan.node_size, plan.node_size)
    nodes = unflatten(meshes.sparse[EXPERT], shape, ("node", "local"), meshes.timeout)
    return TwoLevelAllToAll(nodes.get_group("local"), nodes.get_group("node"))


@dataclass(frozen=True)
class _Slice:
    """How a parameter, of which there is a view for each place that holds it, is divided before ZeRO divides it."""

    views: tuple[LocalView, ...]
    mesh: DeviceMesh
    placements: tuple[Placement, ...]


def _slices(model: nn.Module, meshes: Meshes, found: list[Annotation]) -> list[_Slice]:
    """What becomes of annotated parameters, and of scalars, which fully_shard does not take."""
    layout, slices = meshes.layout, []
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}  # of a shared one there are several
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((module, name))
    sparse, split = set(banks(found)), {n.module for n in found if TENSOR in n.divided.values()}
    for note in found:
        names: tuple[str, ...] = (EXPERT,) if note.module in sparse else ()
        names += (TENSOR,) if layout.tensor_parallel_size > 1 and note.module in split else ()
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
        views = tuple(LocalView(*place, scale, gradient_scale, tuple(groups)) for place in places[note.parameter])
        slices.append(_Slice(views, mesh, tuple(placements)))
    mesh = meshes.data["data_parallel"]
    for parameter in model.parameters():
        if parameter.ndim == 0 and not isinstance(parameter, DTensor):
            mean = 1.0 / meshes.data_size
            views = tuple(LocalView(*place, 1.0, mean, (mesh.get_group(),)) for place in places[parameter])
            slices.append(_Slice(views, mesh, (Replicate(),)))
    return slices


def _attach(
    meshes: Meshes, found: Sequence[Annotation], slices: Sequence[_Slice], units: Collection[nn.Module]
) -> None:
    """Hooks that show local views in forward, and those of tensor-parallel layers."""
    for unit in units:
        clone_output_views(unit)
    tensor = meshes.tensor_group
    annotated = dict.fromkeys(n.module for n in found)
    outer = {inner: module for module in annotated for inner in module.modules()}
    views = [view for part in slices for view in part.views]
    shown: dict[nn.Module, list[LocalView]] = {}
    for unit in units:  # inner ones first: a view belongs to the innermost unit, and to the module that names the axes
        inside = set(unit.modules())
        for view in (view for view in views if view.module in inside):
            for holder in dict.fromkeys((unit, outer.get(view.module, view.module))):
                shown.setdefault(holder, []).append(view)
        views = [view for view in views if view.module not in inside]
    for holder, mine in shown.items():
        LocalViews(holder, mine)
    if tensor.size() == 1:
        return
    for module in annotated:
        notes = [n for n in found if n.module is module]
        split = {n.axes[d] for n in notes for d, name in n.divided.items() if name == TENSOR}
        if "vocab" in split:
            module.vocabulary = VocabParallel(tensor)  # type: ignore[assignment]
        elif split and any("embed" in n.axes for n in notes):
            _join_partners(module, tensor)


def _join_partners(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Sum the gradients of what enters a divided layer and the values of what leaves it."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(into, args)), {name: into(value) for name, value in kwargs.items()}

    def into(value: Any) -> Any:
        return sum_gradient(value, [group]) if isinstance(value, Tensor) and value.requires_grad else value

    def leave(_: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"a module with a divided axis must return one tensor, the sum of its parts: {type(module).__name__} "
                f"returned {type(output).__name__}. Name its axes otherwise, or use tensor_parallel_size=1."
            )
        return sum_value(output, group)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


# -- when they are ---------------------------------------------------------------------------------------------------


class _Sharder:
    """Shards unit after unit, inner ones first, as soon as its weights are there."""

    def __init__(
        self,
        model: nn.Module,
        meshes: Meshes,
        found: list[Annotation],
        slices: Sequence[_Slice],
        dimensions: Mapping[str, int],
    ) -> None:
        self.meshes, self.banks, self.dimensions = meshes, set(banks(found)), dimensions
        self.model, self.paths = model, {module: path for path, module in model.named_modules()}
        self.slices: dict[nn.Module, list[_Slice]] = {}
        for part in slices:
            self.slices.setdefault(part.views[0].module, []).append(part)
        # What ranks read by themselves comes from no other rank.
        self.stored = {module for module in model.modules() if StoredWeights.has(module)}
        self.divided: set[nn.Module] = set()
        self.offload = (
            CPUOffloadPolicy(pin_memory=meshes.dense.device_type == "cuda")
            if meshes.layout.offload == "parameters"
            else OffloadPolicy()
        )

    def shard(self, unit: nn.Module, dtype: torch.dtype | None) -> None:
        """Take the weights of rank 0, slice them, and let `fully_shard` divide them, gathered in `dtype`."""
        mine = [module for module in unit.modules() if module not in self.divided]
        self.divided.update(mine)
        self._take_from_rank_zero([module for module in mine if module not in self.stored])
        for module in mine:
            for part in self.slices.get(module, ()):
                _divide(part)
        own = list(unit.named_parameters(self.paths[unit]))
        placed = {parameter: Shard(self.dimensions[name]) for name, parameter in own if name in self.dimensions}
        bank = unit in self.banks
        mesh, name = (self.meshes.sparse, EXPERT_SHARD) if bank else (self.meshes.dense, SHARD)
        wrapped = fully_shard(
            unit,
            mesh=mesh[REPLICATE, name] if mesh[REPLICATE].size() > 1 else mesh[name],
            reshard_after_forward=unit is not self.model and self.meshes.layout.zero_stage != 2,
            shard_placement_fn=lambda p: placed[p],
            mp_policy=MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=None if dtype is None else own[0][1].dtype,
                cast_forward_inputs=False,
            ),
            offload_policy=self.offload,
            ignored_params={parameter for _, parameter in own if parameter.ndim == 0},
        )  # fmt: skip
        reduce_unused_gradients(wrapped)

    @torch.no_grad()
    def _take_from_rank_zero(self, modules: Sequence[nn.Module]) -> None:
        held = [t for m in modules for t in [*m._parameters.values(), *m._buffers.values()] if t is not None]
        for tensor in dict.fromkeys(held):
            if not isinstance(tensor, DTensor):
                # Offloaded weights are in host memory, where a GPU's process group cannot reach them.
                sent = tensor.detach().to(self.meshes.dense.device_type)
                dist.broadcast(sent, src=0)
                tensor.detach().copy_(sent)


def _divide(part: _Slice) -> None:
    """Make a DTensor of a parameter, wherever it is held."""
    first = part.views[0]
    parameter = first.module._parameters[first.name]
    assert parameter is not None
    divided = distribute_tensor(parameter.detach(), part.mesh, part.placements, src_data_rank=None)
    new = nn.Parameter(divided, requires_grad=parameter.requires_grad)
    for view in part.views:
        view.module._parameters[view.name] = new
