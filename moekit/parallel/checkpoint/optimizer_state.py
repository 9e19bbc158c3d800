"""The state of optimizers as tensors and plain data by parameter name, and back, in any layout.

A statistic is named ``optimizer/<number>/<parameter>/<statistic>``, with the parameter's name as in a plain model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moekit.errors import UserError
from moekit.parallel.checkpoint.index import Index
from moekit.parallel.checkpoint.state import clean
from moekit.parallel.master_weights import model_parameter
from moekit.parallel.shards import replicated_like, shard_like


class OtherOptimizersError(UserError):
    """A checkpoint has the state of other optimizers than those that are to take it."""


def flatten_optimizers(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The state to save: statistics that are tensors, by name, and of each optimizer what is none.

    Raises:
        ValueError: If an optimizer has a parameter that is not the model's.
    """
    tensors: dict[str, Tensor] = {}
    plain: list[dict[str, Any]] = []
    for number, optimizer in enumerate(optimizers):
        named = _named_groups(model, optimizer)
        values: dict[str, dict[str, Any]] = {}
        for name, parameter in chain.from_iterable(named):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{number}/{name}/{key}"] = value.detach()
                else:
                    values.setdefault(name, {})[key] = value
        settings = zip(optimizer.param_groups, _only_names(named), strict=True)
        plain.append({"groups": [{**group, "params": names} for group, names in settings], "values": values})
    return tensors, plain


def _named_groups(model: nn.Module, optimizer: Optimizer) -> list[list[tuple[str, Tensor]]]:
    """The parameters of each group of an optimizer, with their names in the model."""
    names = {id(parameter): clean(name) for name, parameter in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(model_parameter(parameter)) not in names:
                raise ValueError(
                    "an optimizer of a checkpoint must work on the model's parameters: got one of shape "
                    f"{tuple(parameter.shape)} that the model does not have. Make the optimizer after parallelizing "
                    "the model."
                )
        found.append([(names[id(model_parameter(parameter))], parameter) for parameter in group["params"]])
    return found


def _only_names(groups: list[list[tuple[str, Tensor]]]) -> list[list[str]]:
    return [[name for name, _ in group] for group in groups]


def optimizer_targets(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    index: Index,
    plain: Mapping[str, Any],
    where: str,
    *,
    renamed: bool = False,
) -> dict[str, Tensor]:
    """Tensors to be filled with the optimizers' statistics, sharded as their parameters are.

    Parameters that were `renamed` since are known by their places, as torch knows them, if those whose names are known
    stand where they stood.

    Raises:
        OtherOptimizersError: If the checkpoint is of others.
    """
    saved = plain.get("optimizers", [])
    if len(saved) != len(optimizers):
        raise OtherOptimizersError(
            f"the checkpoint {where} must have the state of {len(optimizers)} optimizers: it has that of {len(saved)}. "
            "Load it with the optimizers that it was saved with, or with none."
        )
    targets: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        named = _named_groups(model, optimizer)
        here = _only_names(named)
        there = [group["params"] for group in saved[number]["groups"]]
        now = _pairs(there, here, renamed=renamed)
        if now is None:
            raise OtherOptimizersError(
                f"the checkpoint {where} groups the parameters of optimizer {number} otherwise: {_sizes(there)} there, "
                f"{_sizes(here)} here. Configure the optimizer as it was."
            )
        parameters = dict(chain.from_iterable(named))
        for key, entry in index.under(f"optimizer/{number}/").items():
            name, _, statistic = key.rpartition("/")
            found = _empty_statistic(parameters[now[name]], statistic, entry.shape, entry.dtype)
            targets[f"optimizer/{number}/{key}"] = found
    return targets


def _pairs(
    there: Sequence[Sequence[str]], here: Sequence[Sequence[str]], *, renamed: bool = False
) -> dict[str, str] | None:
    """Saved name -> present name of an optimizer's parameters; None if they are others."""
    if [set(group) for group in there] == [set(group) for group in here]:
        return {name: name for group in here for name in group}
    if not renamed or [len(group) for group in there] != [len(group) for group in here]:
        return None
    pairs = dict(zip(chain.from_iterable(there), chain.from_iterable(here), strict=True))
    return pairs if all(pairs[name] == name for name in pairs.keys() & set(pairs.values())) else None


def _sizes(groups: Sequence[Sequence[str]]) -> str:
    return f"{len(groups)} groups of {', '.join(str(len(group)) for group in groups)}"


def optimizer_state_from(
    saved: Mapping[str, Any], tensors: Mapping[str, Tensor], order: Sequence[Sequence[str]] | None = None
) -> dict[str, Any]:
    """The state dict of an optimizer, in torch's own form, of its saved groups and plain statistics and its `tensors`.

    Those are named ``<parameter>/<statistic>``. `order` has the names of the parameters of each group, where the
    optimizer has them in another order than `saved`.
    """
    order = [group["params"] for group in saved["groups"]] if order is None else order
    numbers = {name: n for n, name in enumerate(name for group in order for name in group)}
    state: dict[int, dict[str, Any]] = {n: dict(saved["values"].get(name, {})) for name, n in numbers.items()}
    for key, value in tensors.items():
        name, _, statistic = key.rpartition("/")
        state[numbers[name]][statistic] = value
    groups = [
        {**group, "params": [numbers[name] for name in names]}
        for group, names in zip(saved["groups"], order, strict=True)
    ]
    return {"state": {n: s for n, s in state.items() if s}, "param_groups": groups}


def optimizer_states_from(
    model: nn.Module, optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """State dicts for the optimizers, from filled tensors and what is not a tensor."""
    found = []
    for number, optimizer in enumerate(optimizers):
        prefix = f"optimizer/{number}/"
        of = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        saved = plain["optimizers"][number]
        order = _only_names(_named_groups(model, optimizer))
        by_name = _pairs([group["params"] for group in saved["groups"]], order) is not None
        found.append(optimizer_state_from(saved, of, order if by_name else None))
    return found


def _empty_statistic(parameter: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Sharded like its parameter where it has the same shape, else repeated on all ranks."""
    if name == "step" or (not shape and parameter.ndim):
        # As torch's optimizers keep it; `load_state_dict` moves it to the right device.
        return torch.empty(shape, dtype=dtype)
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype)
    device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
    return replicated_like(torch.empty(shape, dtype=dtype, device=device), parameter)


def shard_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of an optimizer with every statistic sharded as the parameter that it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=False))
    found = {
        number: {name: _shard_statistic(name, value, of.get(number)) for name, value in statistics.items()}
        for number, statistics in state["state"].items()
    }
    return {**state, "state": found}


def _shard_statistic(name: str, value: Any, parameter: Tensor | None) -> Any:
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or name == "step":
        return value
    if value.shape == parameter.shape:
        return shard_like(value, parameter)
    if isinstance(value, DTensor) or not value.ndim:
        return value
    return replicated_like(value.to(parameter.to_local().device), parameter)
