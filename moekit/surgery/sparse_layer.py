"""What of a model belongs to which expert: read from the axes that modules name, never from names of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts.base import is_expert_bank

State = Mapping[str, Tensor]
"""A state dict, or what an optimizer keeps for each parameter under the same names."""

PLAIN_AXES = {"expert", "embed", "mlp"}
"""The axes of experts that have one layer of hidden units, which operations on matrices know how to change."""


@dataclass(frozen=True)
class SparseLayer:
    """One sparse layer of a model, as surgery sees it. Tensors are named as in the model's state dict.

    Attributes:
        path: The dotted name of the layer.
        router: The class of its router ("" where the layer routes by itself).
        experts: The class of its expert bank.
        num_experts: The number of experts E.
        k: The number of experts per token; of ReLU routers the average.
        bank_axes: The tensors of the experts, each with its logical axes.
        scores: The tensors of the router that have an entry, or a block, for each expert; with that dimension.
        ids: The integer tensors whose values are numbers of experts.
        obstacle: The reason why experts cannot be taken out or added here; None = they can.
        routing_module: The router, or the layer where it routes by itself.
        router_name: What state dicts call the router, in the layer.
    """

    path: str
    router: str
    experts: str
    num_experts: int
    k: float
    bank_axes: Mapping[str, tuple[str, ...]]
    scores: Mapping[str, int] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    obstacle: str | None = None
    routing_module: nn.Module | None = field(default=None, repr=False, compare=False)
    router_name: str = "router"

    @property
    def prefix(self) -> str:
        """What the names of the layer's tensors begin with."""
        return f"{self.path}." if self.path else ""

    @property
    def router_prefix(self) -> str:
        """What the names of the router's tensors begin with."""
        return f"{self.prefix}{self.router_name}." if self.router else self.prefix

    @property
    def bank(self) -> dict[str, int]:
        """The tensors of the experts, each with the dimension that counts experts."""
        return {name: axes.index("expert") for name, axes in self.bank_axes.items()}

    @property
    def dims(self) -> dict[str, int]:
        """Everything that counts experts: bank and scores."""
        return {**self.bank, **self.scores}


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """All sparse layers of a model by their dotted names, in its order.

    A sparse layer is a module with an attribute `experts` that is an expert bank: a `MoELayer`, a `SoftMoELayer`, or
    one of yours. Of its bank `axes` tells which dimension counts experts, of its router `expert_dims` and `expert_ids`
    (see `moekit.routing.Router`). The model may be on the meta device.
    """
    found = {}  # a bank that wraps another bank is no layer
    for path, module in model.named_modules(remove_duplicate=False):
        bank = getattr(module, "experts", None)
        if isinstance(bank, nn.Module) and is_expert_bank(bank) and not is_expert_bank(module):
            found[path] = _layer(path, module, bank)
    return found


def require_separable(layers: Mapping[str, SparseLayer], what: str) -> None:
    """Raise UserError if there is no sparse layer, or one whose experts cannot be told apart.

    Args:
        layers: The result of `sparse_layers`.
        what: The beginning of the message, for example the file that the model is from.
    """
    if not layers:
        raise UserError(f"{what} must have sparse layers: it is a dense model.")
    for layer in layers.values():
        if layer.obstacle is not None:
            raise UserError(f"{what}: the experts of {layer.path} cannot be taken apart: {layer.obstacle}.")


def _layer(path: str, module: nn.Module, bank: nn.Module) -> SparseLayer:
    router = getattr(module, "router", None)
    routing_module = router if isinstance(router, nn.Module) else module
    num_experts = int(getattr(bank, "num_experts"))  # noqa: B009 (a Module's attributes have no type)
    prefix = f"{path}." if path else ""
    axes: Mapping[str, tuple[str, ...]] = getattr(bank, "axes", {})
    bank_axes, scores, obstacles = {}, {}, []
    for name, tensor in bank.state_dict().items():
        named = tuple(axes.get(name, ()))
        if "expert" in named and tensor.shape[named.index("expert")] == num_experts:
            bank_axes[f"{prefix}experts.{name}"] = named
        else:
            obstacles.append(
                f"{type(bank).__name__}.{name} of shape {tuple(tensor.shape)} does not count all {num_experts} experts"
            )
    kind = type(routing_module).__name__
    # State dicts may call it otherwise than code does.
    router_name = next((name for name, child in module.named_children() if child is router), "router")
    inner = prefix if routing_module is module else f"{prefix}{router_name}."
    own = routing_module.state_dict()
    unsaved = routing_module._non_persistent_buffers_set
    dims: Mapping[str, int] | None = getattr(routing_module, "expert_dims", None)
    if dims is None:
        obstacles.append(f"{kind} does not say which of its tensors count experts (expert_dims)")
    for name, dim in (dims or {}).items():
        if name in unsaved:  # in no state dict
            continue
        if name not in own or own[name].ndim <= dim or own[name].shape[dim] % num_experts:
            obstacles.append(f"{kind}.{name} does not count {num_experts} experts in dimension {dim}")
        scores[f"{inner}{name}"] = dim
    return SparseLayer(
        path=path,
        router="" if routing_module is module else kind,
        experts=type(bank).__name__,
        num_experts=num_experts,
        k=float(getattr(routing_module, "k", num_experts if routing_module is module else 1)),
        bank_axes=bank_axes,
        scores=scores,
        ids=tuple(f"{inner}{name}" for name in getattr(routing_module, "expert_ids", ())),
        obstacle=obstacles[0] if obstacles else None,
        routing_module=routing_module,
        router_name=router_name,
    )


def expert_tensors(layers: Mapping[str, SparseLayer]) -> Iterator[tuple[str, SparseLayer, int]]:
    """Every tensor that counts experts, with its layer and the dimension."""
    for layer in layers.values():
        for name, dim in layer.dims.items():
            yield name, layer, dim


def below(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
