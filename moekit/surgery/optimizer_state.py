"""Optimizer state through surgery: Adam's moments are treated as the weights that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.errors import UserError

Slots = Mapping[str, Mapping[str, Any]]
"""What an optimizer keeps of each parameter, by the parameter's name: ``{"w": {"step": ..., "exp_avg": ...}}``."""

_POWERS = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2, "momentum_buffer": -1}


def parameter_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters that an optimizer steps, in the order of its state dict."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def state_by_name(state: Mapping[str, Any], names: Sequence[str], what: str) -> dict[str, dict[str, Any]]:
    """The state of an optimizer by names of parameters instead of numbers.

    Args:
        state: The result of ``optimizer.state_dict()``.
        names: The names of the parameters, from `parameter_names`.
        what: The beginning of a message, such as the file.

    Raises:
        UserError: if it is the state of an optimizer over another number of parameters.
    """
    count = sum(len(group["params"]) for group in state["param_groups"])
    if count != len(names):
        raise UserError(f"{what}: its optimizer has {count} parameters, the model that it describes {len(names)}.")
    return {names[int(number)]: dict(slots) for number, slots in state["state"].items()}


def state_by_number(
    slots: Slots, names: Sequence[str], groups: Sequence[Mapping[str, Any]], former: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """A state dict to load into the optimizer of the new model.

    Args:
        slots: The slots of each parameter by its name; for one without any the optimizer starts afresh.
        names: The names of the new model's parameters, from `parameter_names`.
        groups: The ``param_groups`` of the new optimizer's state dict.
        former: The groups of the old one: groups of the same name keep their settings, such as the learning rate.
    """
    settings = {group["name"]: group for group in former if "name" in group}
    joined = [{**group, **settings.get(str(group.get("name")), {}), "params": group["params"]} for group in groups]
    numbers = {name: number for number, name in enumerate(names)}
    return {"state": {numbers[name]: dict(found) for name, found in slots.items()}, "param_groups": joined}


def carry_state(
    states: Sequence[Slots],
    shapes: Sequence[Mapping[str, torch.Size]],
    operation: Callable[[Sequence[Mapping[str, Tensor]], int], Mapping[str, Tensor]],
    wanted: Mapping[str, torch.Size],
    origin: Callable[[str], str] = lambda name: name,
) -> dict[str, dict[str, Any]]:
    """Optimizer state of the new model from that of the old one or ones.

    Slots of a parameter's shape (moments) go through the operation; numbers, such as Adam's step, become the largest
    of the old ones. A parameter whose slots have other shapes (Adafactor's rows and columns), or that one of the old
    optimizers has not stepped yet, starts afresh.

    Args:
        states: The slots of the old optimizers, by parameter name.
        shapes: The shapes of the old models' parameters.
        operation: what was done to the weights, for several models at once; it also gets the power of the gradient
            that a slot holds, as a negative number (see `split_experts`).
        wanted: The shapes of the new model's parameters.
        origin: Gives the old parameter that a new one is from, for its numbers.
    """
    moments = {
        name: [kind for kind, value in slots.items() if _is_moment(kind, value, shapes[0][name])]
        for name, slots in states[0].items()
        if all(name in state for state in states) and _regular(name, states, shapes)
    }
    carried: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(kind for kinds in moments.values() for kind in kinds):
        holders = [name for name, kinds in moments.items() if kind in kinds]
        tensors = [{name: state[name][kind] for name in holders} for state in states]
        for name, tensor in operation(tensors, _POWERS.get(kind, -1)).items():
            if origin(name) in holders and name in wanted and tensor.shape == wanted[name]:
                carried.setdefault(name, {})[kind] = tensor
    for name, slots in carried.items():
        source = origin(name)
        for kind in states[0][source]:
            if kind not in moments[source]:
                slots[kind] = _largest([state[source][kind] for state in states])
    return carried


def _is_moment(kind: str, value: Any, shape: torch.Size) -> bool:
    """Whether a slot is a tensor of the parameter's shape, and not a number, such as Adam's step."""
    return isinstance(value, Tensor) and kind != "step" and (value.ndim > 0 or shape == torch.Size())


def _regular(name: str, states: Sequence[Slots], shapes: Sequence[Mapping[str, torch.Size]]) -> bool:
    """Whether all tensors that the optimizers keep of a parameter have its shape, and are the same slots."""
    slots = [set(state[name]) for state in states]
    return all(found == slots[0] for found in slots) and all(
        value.shape == shape[name]
        for state, shape in zip(states, shapes, strict=True)
        for kind, value in state[name].items()
        if _is_moment(kind, value, shape[name])
    )


def _largest(values: Sequence[Any]) -> Any:
    return max(values, key=float) if all(isinstance(v, int | float | Tensor) for v in values) else values[0]
