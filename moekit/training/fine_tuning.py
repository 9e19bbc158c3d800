"""Fine-tuning: which parameters train, how experts are dropped out, and where a run starts from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moekit.errors import nearest
from moekit.experts import is_expert_bank
from moekit.routing import Capacity, Router
from moekit.surgery.adapters import is_adapter, is_dense_part
from moekit.surgery.sparse_layer import sparse_layers

Names = frozenset[str]
"""Names of parameters, as `named_parameters` gives them."""


@dataclass(frozen=True)
class Subset:
    """Some parameters of a model, by what they are for.

    Subsets can be joined (``ATTENTION | FEED_FORWARD``) and taken from each other (``ALL - ROUTERS``).

    Attributes:
        name: what it is called.
        find: the names of its parameters in a model.
    """

    name: str
    find: Callable[[nn.Module], Names]

    def __or__(self, other: Subset) -> Subset:
        return Subset(f"{self.name}+{other.name}", lambda model: self.find(model) | other.find(model))

    def __sub__(self, other: Subset) -> Subset:
        return Subset(f"{self.name}-{other.name}", lambda model: self.find(model) - other.find(model))

    def __repr__(self) -> str:
        return f"Subset({self.name})"


def _everything(model: nn.Module) -> Names:
    return frozenset(name for name, _ in model.named_parameters())


def _below(model: nn.Module, prefixes: tuple[str, ...]) -> Names:
    return frozenset(name for name in _everything(model) if name.startswith(prefixes))


def _of_layers(*parts: str) -> Callable[[nn.Module], Names]:
    """Parameters of the named parts of sparse layers, which an adopted layer has under other names."""

    def found(model: nn.Module) -> Names:
        layers = {path: model.get_submodule(path) for path in sparse_layers(model)}
        wanted = {id(getattr(layer, part, None)) for layer in layers.values() for part in parts}
        named = ((path, name, inner) for path, layer in layers.items() for name, inner in layer.named_modules())
        return _below(model, tuple(f"{path}.{name}.".lstrip(".") for path, name, m in named if id(m) in wanted))

    return found


def _of_kind(kind: Literal["attention", "feed_forward"]) -> Callable[[nn.Module], Names]:
    """Parameters of modules that count as this kind, also those of transformers."""
    return lambda model: _below(
        model, tuple(f"{path}." for path, module in model.named_modules() if is_dense_part(module, kind))
    )


ALL = Subset("all", _everything)
"""Every parameter."""
EXPERTS = Subset("experts", _of_layers("experts"))
"""The expert banks."""
ROUTERS = Subset("routers", _of_layers("router"))
"""The routers."""
MOE = Subset("moe", _of_layers("experts", "router"))
"""Experts and routers. A shared branch, which every token takes, is a dense feed-forward."""
NON_MOE = Subset("non_moe", (ALL - MOE).find)
"""All but experts and routers."""
ATTENTION = Subset("attention", _of_kind("attention"))
"""Projections of self-attention and cross-attention."""
FEED_FORWARD = Subset("feed_forward", _of_kind("feed_forward"))
"""Dense feed-forwards, shared branches of sparse layers included."""
ADAPTERS = Subset("adapters", lambda model: frozenset(name for name in _everything(model) if is_adapter(name)))
"""Low-rank adapters, see `moekit.surgery.adapters`."""

SUBSETS: Mapping[str, Subset] = {
    s.name: s for s in (ALL, NON_MOE, MOE, EXPERTS, ROUTERS, ATTENTION, FEED_FORWARD, ADAPTERS)
}
"""The subsets by name."""


def subset(text: str) -> Subset:
    """A subset from its name, or from several with ``+`` and ``-`` between, from left to right: ``all-routers``.

    Raises:
        ValueError: an unknown name, with the nearest one.

    Source: arXiv:2202.08906 section 4 compares all, non-MoE, MoE, attention and feed-forward parameters.
    """
    words = re.split(r"([+-])", text.replace(" ", ""))
    found: Subset | None = None
    for sign, name in zip(["+", *words[1::2]], words[::2], strict=True):
        if name not in SUBSETS:
            hint = nearest(name, SUBSETS)
            raise ValueError(f"parameters must be named as in all-routers or attention+experts: got {name!r}. {hint}")
        part = SUBSETS[name]
        found = part if found is None else found | part if sign == "+" else found - part
    assert found is not None, "a split gives one word at least"
    return Subset(text, found.find)


@dataclass(frozen=True)
class Trained:
    """What of a model trains.

    Attributes:
        names: the parameters.
        trained: how many numbers they hold.
        total: how many the model holds.
    """

    names: Names
    trained: int
    total: int


def train_only(model: nn.Module, chosen: Subset) -> Trained:
    """Let the parameters of a subset train, and freeze all others: in place, also those that were frozen before.

    A router of which nothing trains is `Component.frozen`: what else moves in it (the bias of a loss-free router, a
    schedule of temperature, a coefficient) stays as it is too. Parameters that are shared (a table that embeds and
    makes logits) are one parameter.

    Raises:
        ValueError: if the model has no such parameter.

    Source: arXiv:2202.08906 section 4: updating non-MoE parameters alone costs little, MoE alone much.
    """
    names = chosen.find(model)
    if not names:
        raise ValueError(
            f"the parameters to train must be some of the model's: it has none that are {chosen.name}. Choose "
            f"others of {', '.join(SUBSETS)}."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    for module in model.modules():
        if isinstance(module, Router):
            own = list(module.parameters())
            module.frozen = bool(own) and not any(parameter.requires_grad for parameter in own)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Trained(names, sum(sizes[name] for name in names), sum(sizes.values()))


def set_expert_dropout(model: nn.Module, rate: float) -> None:
    """Set the dropout on hidden activations of all experts; what is no expert keeps its own.

    Raises:
        ValueError: if `rate` is not in [0, 1), there are no experts, or a bank has no dropout.

    Source: arXiv:2101.03961 section 2.4, table 4 (0.4 in experts beside 0.1 elsewhere).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"expert dropout must be in [0, 1): got {rate}.")
    banks = [module for module in model.modules() if is_expert_bank(module)]
    if not banks:
        raise ValueError("the model must have experts: it is dense.")
    for bank in banks:
        if any(is_expert_bank(part) for part in bank.children()):
            continue  # it wraps another, whose dropout it is
        if not hasattr(bank, "dropout"):
            raise ValueError(f"the experts of {type(bank).__name__} have no dropout. Leave expert dropout out.")
        bank.dropout = rate  # type: ignore[assignment]


def set_train_capacity(model: nn.Module, factor: float | None) -> None:
    """Set the capacity factor that routers train with: the smaller, the more tokens are dropped. None = dropless.

    Evaluation is not touched.

    Raises:
        ValueError: if no router has a capacity, or the factor is not positive.

    Source: arXiv:2202.08906 section 4: 10 to 15 % of dropped tokens do no harm in fine-tuning.
    """
    found: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "capacity", None), Capacity)]
    if not found:
        raise ValueError("the model must have routers with a capacity to set one: it has none.")
    for router in found:
        router.capacity = dataclasses.replace(router.capacity, train=factor)


def with_slots(
    make: Callable[[nn.Module], Optimizer], slots: Mapping[str, Mapping[str, Any]]
) -> Callable[[nn.Module], Optimizer]:
    """An optimizer's factory whose optimizer begins with state: that of the run that the weights are from.

    Args:
        make: makes the optimizer of a module.
        slots: state by parameter name, as `moekit.surgery.state_by_name` gives it. Parameters that do not train are
            passed over, others begin afresh where they have none or tensors of another shape.

    Source: arXiv:2202.08906 (resetting the slots of Adafactor hurts).
    """

    def made(module: nn.Module) -> Optimizer:
        optimizer = make(module)
        stepped = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in module.named_parameters():
            found = slots.get(name)
            if found is None or id(parameter) not in stepped:
                continue
            if isinstance(parameter, DTensor):
                raise ValueError(
                    "optimizer state of whole parameters cannot begin a divided model: start with a fresh optimizer."
                )
            tensors = [value for key, value in found.items() if isinstance(value, Tensor) and key != "step"]
            if all(value.shape == parameter.shape for value in tensors):
                group = stepped[id(parameter)]
                optimizer.state[parameter] = {
                    key: _beside(value, parameter, key, group) if isinstance(value, Tensor) else value
                    for key, value in found.items()
                }
        return optimizer

    return made


def _beside(value: Tensor, parameter: Tensor, key: str, group: Mapping[str, Any]) -> Tensor:
    """A copy of a slot where the optimizer wants it: steps lie with the parameter only if a kernel counts them."""
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return value.clone()
    return value.to(device=parameter.device, dtype=torch.float32, copy=True)
