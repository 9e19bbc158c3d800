"""ShardingPlan: which logical axis is divided among which ranks, and which modules gather their weights together.

A module names the logical axes of its parameters in a class attribute::

    axes = {"w_in": ("expert", "embed", "mlp"), "w_out": ("expert", "mlp", "embed"), "b_out": ("expert", "embed")}

and a plan maps names to mesh dimensions. What the names promise:

- ``expert``: entry e belongs to expert e. Forward takes the number of experts from the parameter or the counts.
- ``mlp``, ``heads``: the module's output is a sum over this axis of what each part computes alone, and a parameter
  whose axes are ``("embed",)``, or ``("expert", "embed")``, is added to that sum. Forward reads the size of the axis
  from the parameter. A module with an attribute `heads` has as many, of equal size, and none is cut in two.
- ``vocab``: rows of a table of tokens; for modules with an attribute `vocabulary` (`TokenEmbedding`).
- any other name is not divided.

Source: the annotations of GShard, arXiv:2006.16668 section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import nn

from moekit.layer import MoELayer

Wrap = Callable[[nn.Module], Iterable[nn.Module]]

AXES = MappingProxyType({"expert": "expert", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"})


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The default policy: layers that a model lists several times, all of one class, in an `nn.ModuleList`.

    Transformer blocks of this package and of Hugging Face are such layers. A `MoELayer` is not: its experts gather
    their weights themselves, and little is left. All ranks must run the same layers.
    """
    found: list[nn.Module] = []
    for module in model.modules():
        layers = list(module) if isinstance(module, nn.ModuleList) else []
        same = len({type(layer) for layer in layers}) == 1
        if len(layers) < 2 or not same or type(layers[0]).forward is nn.Module.forward:
            continue
        if not isinstance(layers[0], MoELayer):
            found += [layer for layer in layers if next(layer.parameters(), None) is not None]
    return found


def no_layers(model: nn.Module) -> list[nn.Module]:
    """A policy that leaves everything but the experts in one group, whose weights are gathered for the whole step."""
    return []


def layers_of(*classes: type[nn.Module]) -> Wrap:
    """The policy that takes all modules of the given classes.

    Example:
        >>> from torch import nn
        >>> len(layers_of(nn.Linear)(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
        1
    """
    return lambda model: [module for module in model.modules() if isinstance(module, classes)]


@dataclass(frozen=True)
class ShardingPlan:
    """How a model is sharded over meshes.

    Attributes:
        axes: The mesh dimension that divides an axis, by logical axis; one that is left out stays whole.
        wrap: A function that says which modules gather their weights for their own forward only. Expert banks always
            do. Every rank must call these modules equally often and in the same order.
        node_size: The number of ranks of an expert group on one node, next to each other; the all-to-all then goes in
            two levels, inside nodes and between them. None = one level.

    Raises:
        ValueError: If an axis is mapped to a mesh dimension that cannot divide it, or `node_size` is below 1.
    """

    axes: Mapping[str, str] = field(default_factory=lambda: AXES)
    wrap: Wrap = repeated_layers
    node_size: int | None = None

    def __post_init__(self) -> None:
        for axis, dimension in self.axes.items():
            if (axis == "expert") != (dimension == "expert") or dimension not in ("expert", "tensor"):
                raise ValueError(
                    'ShardingPlan.axes maps "expert" to the mesh dimension "expert" and other axes to "tensor": got '
                    f"{axis!r}: {dimension!r}. Leave an axis out to keep it whole."
                )
        if self.node_size is not None and self.node_size < 1:
            raise ValueError(f"ShardingPlan.node_size must be at least 1, or None: got {self.node_size}.")
