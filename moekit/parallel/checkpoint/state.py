"""The state of a model and its optimizers as one flat dictionary of tensors, and the rest as plain data.

Names do not depend on the layout: ``model/<parameter>`` and ``optimizer/<number>/<parameter>/<statistic>``, with the
parameter's name as in a plain model. What wrappers insert into names is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moekit.errors import UserError
from moekit.parallel.checkpoint.index import Index
from moekit.parallel.checkpoint.layout import empty_like, statistic_like
from moekit.parallel.shadows import original

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class OtherOptimizersError(UserError):
    """A checkpoint has the state of other optimizers than those that are to take it."""


@dataclass(frozen=True)
class Collected:
    """What a checkpoint is made of.

    Attributes:
        tensors: by name; DTensors, or tensors that all ranks repeat.
        plain: numbers, strings, and lists and dictionaries of them.
    """

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


def clean(name: str) -> str:
    """A parameter's name without what wrappers insert."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


_TENSOR = "__tensor__"


def take_out(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`tree` with every DTensor in it moved to `tensors`, under the name of its place in the tree."""
    if isinstance(tree, DTensor):
        tensors[path] = tree.detach()
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        return {key: take_out(value, tensors, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(take_out(value, tensors, f"{path}/{n}") for n, value in enumerate(tree))
    return tree


def put_back(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `take_out`."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: put_back(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(put_back(value, tensors) for value in tree)
    return tree


def extra_targets(model: nn.Module, index: Index) -> dict[str, Tensor]:
    """Empty tensors for what `take_out` found: laid out like the model's tensor of that name and shape, else whole."""
    own = {name.partition("/")[2]: tensor for name, tensor in model_tensors(model)[0].items()}
    targets: dict[str, Tensor] = {}
    for key, entry in index.entries.items():
        if key.startswith("extra/"):
            like = own.get(clean(key.rpartition("/")[2]))
            if like is not None and tuple(like.shape) == entry.shape:
                targets[key] = empty_like(like, entry.dtype)
            else:
                targets[key] = torch.empty(entry.shape, dtype=entry.dtype)
    return targets


def names_of(model: nn.Module) -> dict[int, str]:
    """The first name of every parameter, by id."""
    return {id(parameter): clean(name) for name, parameter in model.named_parameters()}


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of shared parameters and buffers -> their first name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for name, tensor in (*parameters, *buffers):
        kept = first.setdefault(id(tensor), clean(name))
        if kept != clean(name):
            found[clean(name)] = kept
    return found


def model_tensors(
    model: nn.Module, state: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """What a model's state dict holds, by names that no wrapper has changed.

    Args:
        model: whose it is.
        state: its state dict, perhaps edited; None = as it is.

    Returns:
        Tensors (``model/<name>``), shared ones once; what a module saves that is no tensor; further names of shared
        tensors -> the name that they are among the tensors.
    """
    state = model.state_dict() if state is None else state  # which also makes fully_shard put its parameters back
    values = {clean(name): value for name, value in state.items()}
    tensors: dict[str, Tensor] = {}
    other: dict[str, Any] = {}
    shared: dict[str, str] = {}
    known = aliases(model)
    for name, value in values.items():
        if name in known and _same(value, values.get(known[name])):
            shared[name] = known[name]
        elif isinstance(value, Tensor):
            tensors[f"model/{name}"] = value
        else:
            other[name] = value
    return tensors, other, shared


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same memory: an edit may have parted what a model shares."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (one, other))
    return a.data_ptr() == b.data_ptr()


def collect(model: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any] | None = None) -> Collected:
    """The state to save.

    Args:
        model: parallelized or plain.
        optimizers: of the model.
        state: what to save as the model's state dict; None = as it is.

    Raises:
        ValueError: if an optimizer has a parameter that is not the model's.
    """
    own, other, shared = model_tensors(model, state)
    tensors = {name: tensor.detach() for name, tensor in own.items()}
    plain: dict[str, Any] = {"model": other, "shared": shared, "optimizers": []}
    names = names_of(model)
    for number, optimizer in enumerate(optimizers):
        values: dict[str, dict[str, Any]] = {}
        for parameter, name in _named(optimizer, names):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{number}/{name}/{key}"] = value.detach()
                else:
                    values.setdefault(name, {})[key] = value
        plain["optimizers"].append({"groups": _groups(optimizer, names), "values": values})
    return Collected(tensors, plain)


def _named(optimizer: Optimizer, names: Mapping[int, str]) -> list[tuple[Tensor, str]]:
    return [(p, _name(p, names)) for group in optimizer.param_groups for p in group["params"]]


def _name(parameter: Tensor, names: Mapping[int, str]) -> str:
    found = names.get(id(original(parameter)))
    if found is None:
        raise ValueError(
            f"an optimizer of a checkpoint must work on the model's parameters: got one of shape "
            f"{tuple(parameter.shape)} that the model does not have. Make the optimizer after parallelizing the model."
        )
    return found


def _groups(optimizer: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Settings of the groups, with names in place of parameters."""
    return [
        {key: [_name(p, names) for p in value] if key == "params" else value for key, value in group.items()}
        for group in optimizer.param_groups
    ]


def model_targets(model: nn.Module, index: Index, *, others: bool = False) -> dict[str, Tensor]:
    """Empty tensors for a checkpoint's model: laid out as the model's of the same name and shape.

    Args:
        model: parallelized in any way, or plain.
        index: of the checkpoint.
        others: whether tensors that the model has not, or not in this shape, are wanted too; whole, on the CPU.
    """
    own, _, shared = model_tensors(model)
    targets: dict[str, Tensor] = {}
    for key, entry in index.entries.items():
        if not key.startswith("model/"):
            continue
        name = key.removeprefix("model/")
        like = own.get(f"model/{shared.get(name, name)}")
        if like is not None and tuple(like.shape) == entry.shape:
            targets[key] = empty_like(like, entry.dtype)
        elif others:
            targets[key] = torch.empty(entry.shape, dtype=entry.dtype)
    return targets


def state_dict_from(model: nn.Module, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for the model, under the names of its own: tensors, shared ones under each of theirs, and the rest.

    Args:
        model: it is for.
        tensors: filled ones, ``model/<name>``.
        plain: what the checkpoint holds that is no tensor.
    """
    values: dict[str, Any] = {name.removeprefix("model/"): t for name, t in tensors.items() if name[:6] == "model/"}
    values |= plain.get("model", {})
    for name, first in (plain.get("shared", {}) | aliases(model)).items():
        if name not in values and first in values:
            values[name] = values[first]
    own = {clean(name): name for name in model.state_dict()}
    return {own.get(name, name): value for name, value in values.items()}


def require_same_model(own: Mapping[str, Any], state: Mapping[str, Any], where: str, *, strict: bool = True) -> None:
    """Raise UserError unless a state dict is of a model.

    Args:
        own: the model's state dict.
        state: the one that it is to take.
        where: the checkpoint, for the message.
        strict: whether all names must be on both sides; else shapes alone are compared.
    """
    here, there = _shapes(own), _shapes(state)
    missing, unknown = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    if strict and (missing or unknown):
        raise UserError(
            f"the checkpoint {where} is of another model: it has no {_list(missing)}, and the model has no "
            f"{_list(unknown)}. Build the model that was saved."
        )
    for name, shape in there.items():
        if here.get(name, shape) != shape:
            raise UserError(
                f"the checkpoint {where} is of another model: {name} has shape {shape} there and {here[name]} here. "
                "Build the model that was saved."
            )


def require_same_tensors(model: nn.Module, index: Index, plain: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless a checkpoint holds the model's tensors, all and no others, shared as they are."""
    for name, first in aliases(model).items():
        if f"model/{name}" in index.entries:
            raise UserError(
                f"the checkpoint {where} is of another model: it has {first} and {name} apart, which are one tensor "
                "here. Build the model that was saved."
            )
    held = {key: torch.empty(entry.shape, device="meta") for key, entry in index.entries.items()}
    there = state_dict_from(model, held, {"shared": plain.get("shared", {})})
    require_same_model({n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}, there, where)


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {clean(name): tuple(v.shape) if isinstance(v, Tensor) else None for name, v in state.items()}


def _list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}" if names else "(nothing)"


def optimizer_targets(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    index: Index,
    plain: Mapping[str, Any],
    where: str,
    *,
    renamed: bool = False,
) -> dict[str, Tensor]:
    """Tensors to be filled with the optimizers' statistics, laid out as their parameters are.

    Args:
        model: whose parameters the optimizers have.
        optimizers: to be loaded.
        index: of the checkpoint.
        plain: what the checkpoint holds that is no tensor.
        where: the checkpoint, for messages.
        renamed: whether parameters may have got other names since: then they are known by their places, as torch knows
            them, if those whose names are known stand where they stood.

    Raises:
        OtherOptimizersError: if the checkpoint is of others.
    """
    saved = plain.get("optimizers", [])
    if len(saved) != len(optimizers):
        raise OtherOptimizersError(
            f"the checkpoint {where} must have the state of {len(optimizers)} optimizers: it has that of {len(saved)}. "
            "Load it with the optimizers that it was saved with, or with none."
        )
    names = names_of(model)
    targets: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        here = [group["params"] for group in _groups(optimizer, names)]
        there = [group["params"] for group in saved[number]["groups"]]
        now = _pairs(there, here, renamed=renamed)
        if now is None:
            raise OtherOptimizersError(
                f"the checkpoint {where} groups the parameters of optimizer {number} otherwise: {_sizes(there)} there, "
                f"{_sizes(here)} here. Configure the optimizer as it was."
            )
        parameters = {name: parameter for parameter, name in _named(optimizer, names)}
        prefix = f"optimizer/{number}/"
        for key, entry in index.entries.items():
            if key.startswith(prefix):
                name, _, statistic = key.removeprefix(prefix).rpartition("/")
                targets[key] = statistic_like(parameters[now[name]], statistic, entry.shape, entry.dtype)
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
    """The state dict of an optimizer, in torch's own form.

    Args:
        saved: groups and plain statistics, with parameters by name.
        tensors: statistics, ``<parameter>/<statistic>``.
        order: names of the parameters of each group, where the optimizer has them in another order than `saved`.
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
    names, found = names_of(model), []
    for number, optimizer in enumerate(optimizers):
        prefix = f"optimizer/{number}/"
        of = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        saved = plain["optimizers"][number]
        order = [group["params"] for group in _groups(optimizer, names)]
        by_name = _pairs([group["params"] for group in saved["groups"]], order) is not None
        found.append(optimizer_state_from(saved, of, order if by_name else None))
    return found
