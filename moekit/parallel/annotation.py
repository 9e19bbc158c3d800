"""Reading the axes that a model names, and refusing what cannot be divided before any rank talks to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.errors import UserError
from moekit.layer import moe_layers
from moekit.parallel.activations import Activations
from moekit.parallel.layout import Layout
from moekit.parallel.mesh import EXPERT, TENSOR
from moekit.parallel.plan import ShardingPlan


@dataclass(frozen=True)
class Annotation:
    """The logical axes of one parameter.

    Attributes:
        path: The dotted name of the parameter from the root.
        module: The module that names the axes.
        owner: The module that holds the parameter.
        name: The name of the parameter in `owner`.
        axes: The logical axes of its dimensions, outermost first.
        divided: The mesh dimension that divides a tensor dimension, by tensor dimension.
    """

    path: str
    module: nn.Module
    owner: nn.Module
    name: str
    axes: tuple[str, ...]
    divided: Mapping[int, str]

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now."""
        found = self.owner._parameters[self.name]
        assert found is not None
        return found

    @property
    def of_expert(self) -> bool:
        """Whether each expert has its own entries."""
        return "expert" in self.axes

    @property
    def is_output_bias(self) -> bool:
        """Whether it is added to the sum that tensor-parallel partners compute."""
        return tuple(axis for axis in self.axes if axis != "expert") == ("embed",)


def read_annotations(model: nn.Module, plan: ShardingPlan) -> list[Annotation]:
    """All annotated parameters, shared ones once; of two modules that name a parameter the outer one counts.

    Raises:
        UserError: If axes and dimensions of a parameter differ in number.
    """
    found: dict[int, Annotation] = {}
    for path, module in model.named_modules():
        axes = getattr(module, "axes", None)
        if not isinstance(axes, Mapping):
            continue
        for name, parameter in module.named_parameters():
            # What is a DTensor already was divided by somebody else.
            if name not in axes or id(parameter) in found or isinstance(parameter, DTensor):
                continue
            full = f"{path}.{name}" if path else name
            if len(axes[name]) != parameter.ndim:
                raise UserError(
                    f"{type(module).__name__}.axes[{name!r}] must name every dimension: got {axes[name]} for "
                    f"{full} of shape {tuple(parameter.shape)}."
                )
            owner_path, _, short = name.rpartition(".")
            divided = {n: plan.axes[axis] for n, axis in enumerate(axes[name]) if axis in plan.axes}
            owner = module.get_submodule(owner_path)
            found[id(parameter)] = Annotation(full, module, owner, short, tuple(axes[name]), divided)
    return list(found.values())


def banks(found: list[Annotation]) -> list[nn.Module]:
    """The modules that hold experts, in the order of the model."""
    return list(dict.fromkeys(note.module for note in found if note.of_expert))


def check_model(model: nn.Module, layout: Layout, plan: ShardingPlan, found: list[Annotation]) -> None:
    """Raise if the layout cannot hold the model.

    Raises:
        UserError: Naming the parameter or module, and the nearest layout that would do.
    """
    size = {EXPERT: layout.expert_parallel_size, TENSOR: layout.tensor_parallel_size}
    for note in found:
        for dimension, mesh in note.divided.items():
            length = note.parameter.shape[dimension]
            heads = getattr(note.module, "heads", None)
            if note.axes[dimension] == "heads" and isinstance(heads, int):
                length = heads  # the axis has all channels of all heads, and no head is cut in two
            if length % size[mesh]:
                fits = max(n for n in range(1, size[mesh]) if length % n == 0)
                raise UserError(
                    f"the axis {note.axes[dimension]!r} of {note.path} must be divisible by {mesh}_parallel_size: got "
                    f"{length} and {size[mesh]}. Use {mesh}_parallel_size={fits}, or make it "
                    f"{-(-length // size[mesh]) * size[mesh]}."
                )
        takes = hasattr(note.module, "vocabulary")
        if "vocab" in note.axes and "vocab" in plan.axes and size[TENSOR] > 1 and not takes:
            raise UserError(
                f"{note.path} has a vocab axis, and {type(note.module).__name__} cannot work on a part of it, without "
                "an attribute `vocabulary`. Use moekit.transformer.TokenEmbedding, or a ShardingPlan without vocab."
            )
    _check_banks(model, layout, found)
    divided = any(TENSOR in note.divided.values() for note in found)
    if layout.tensor_parallel_size > 1 and not divided and not any(map(_annotates, model.modules())):
        raise UserError(
            f"tensor_parallel_size={layout.tensor_parallel_size} needs modules that name an axis mlp, heads or vocab: "
            "this model has none. Annotate them, or use tensor_parallel_size=1."
        )


def _annotates(module: nn.Module) -> bool:
    """Whether it divides its activations itself."""
    return any(isinstance(child, Activations) for child in module.children())


def _check_banks(model: nn.Module, layout: Layout, found: list[Annotation]) -> None:
    named = {id(note.parameter) for note in found}
    connected = {id(inner) for _, layer in moe_layers(model) for inner in layer.experts.modules()}
    names = {id(module): path for path, module in model.named_modules()}
    for bank in banks(found):
        path = f"{names[id(bank)]} ({type(bank).__name__})"
        for name, parameter in bank.named_parameters():
            if isinstance(parameter, DTensor):
                continue
            if id(parameter) not in named or parameter.ndim == 0:
                raise UserError(
                    f"every parameter of an expert bank must be named in its axes and have a dimension: got {name} of "
                    f"{path}, shape {tuple(parameter.shape)}. Add it to axes."
                )
        if layout.expert_parallel_size == 1:
            continue
        if id(bank) not in connected and not _annotates(bank):
            raise UserError(
                f"the experts of {path} are not in a MoELayer, so nobody would bring rows to them: use MoELayer("
                "router, experts), annotate their rows by Activations, or use expert_parallel_size=1."
            )
        if getattr(bank, "requires_whole_bank", False):
            raise UserError(f"{path} needs all its experts in one process. Use expert_parallel_size=1.")
    for path, layer in moe_layers(model):
        if layout.expert_parallel_size > 1 and getattr(layer, "requires_whole_bank", False):
            raise UserError(f"{path} needs all its experts in one process for now. Use expert_parallel_size=1.")
