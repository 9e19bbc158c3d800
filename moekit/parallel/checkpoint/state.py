"""The state of a model and its optimizers as one flat dictionary of tensors, and the rest as plain data.

Names do not depend on the layout: ``model/<parameter>`` and ``optimizer/<number>/<parameter>/<statistic>``, with the
parameter's name as in a plain model. What wrappers insert into names is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from moekit.errors import UserError
from moekit.parallel.checkpoint.index import Index
from moekit.parallel.shadows import original

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


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
                targets[key] = torch.empty_like(like, dtype=entry.dtype, requires_grad=False)
            else:
                targets[key] = torch.empty(entry.shape, dtype=entry.dtype)
    return targets


def names_of(model: nn.Module) -> dict[int, str]:
    """The first name of every parameter, by id."""
    return {id(parameter): clean(name) for name, parameter in model.named_parameters()}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Further names of shared parameters -> their first name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), clean(name))
        if kept != clean(name):
            found[clean(name)] = kept
    return found


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parameters and persistent buffers by name, shared ones once; and what a module saves that is no tensor."""
    shared = _aliases(model)
    tensors: dict[str, Tensor] = {}
    other: dict[str, Any] = {}
    state = model.state_dict()  # which also makes fully_shard put its divided parameters back
    # The parameters themselves, whose version counts what is written to them.
    own = dict(model.named_parameters())
    for name, value in state.items():
        if clean(name) in shared:
            continue
        if isinstance(value, Tensor):
            tensors[f"model/{clean(name)}"] = own.get(name, value)
        else:
            other[clean(name)] = value
    return tensors, other


def collect(model: nn.Module, optimizers: Sequence[Optimizer]) -> Collected:
    """The state to save.

    Raises:
        ValueError: if an optimizer has a parameter that is not the model's.
    """
    own, other = model_tensors(model)
    tensors = {name: tensor.detach() for name, tensor in own.items()}
    plain: dict[str, Any] = {"model": other, "optimizers": []}
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


def model_targets(model: nn.Module, index: Index, where: str) -> dict[str, Tensor]:
    """The model's own tensors, to be filled from a checkpoint, by name.

    Raises:
        UserError: if names or shapes differ.
    """
    targets, _ = model_tensors(model)
    saved = {name: entry.shape for name, entry in index.entries.items() if name.startswith("model/")}
    missing, unknown = sorted(set(targets) - set(saved)), sorted(set(saved) - set(targets))
    if missing or unknown:
        raise UserError(
            f"the checkpoint {where} is of another model: it has no {_list(missing)}, and the model has no "
            f"{_list(unknown)}. Build the model that was saved."
        )
    for name, target in targets.items():
        if tuple(target.shape) != saved[name]:
            raise UserError(
                f"the checkpoint {where} is of another model: {name.partition('/')[2]} has shape {saved[name]} there "
                f"and {tuple(target.shape)} here. Build the model that was saved."
            )
    return targets


def _list(names: Sequence[str]) -> str:
    short = [name.partition("/")[2] for name in names]
    return f"{', '.join(short[:4])}{f' and {len(short) - 4} more' if len(short) > 4 else ''}" if short else "(nothing)"


def optimizer_targets(
    model: nn.Module, optimizers: Sequence[Optimizer], index: Index, plain: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    """Tensors to be filled with the optimizers' statistics, laid out as their parameters are.

    Raises:
        UserError: if the checkpoint is of other optimizers.
    """
    saved = plain.get("optimizers", [])
    if len(saved) != len(optimizers):
        raise UserError(
            f"the checkpoint {where} must have the state of {len(optimizers)} optimizers: it has that of {len(saved)}. "
            "Load it with the optimizers that it was saved with, or with none."
        )
    names = names_of(model)
    targets: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        here = [group["params"] for group in _groups(optimizer, names)]
        there = [group["params"] for group in saved[number]["groups"]]
        if [set(group) for group in here] != [set(group) for group in there]:
            raise UserError(
                f"the checkpoint {where} groups the parameters of optimizer {number} otherwise: {_sizes(there)} there, "
                f"{_sizes(here)} here. Configure the optimizer as it was."
            )
        parameters = {name: parameter for parameter, name in _named(optimizer, names)}
        prefix = f"optimizer/{number}/"
        for key, entry in index.entries.items():
            if key.startswith(prefix):
                name, _, statistic = key.removeprefix(prefix).rpartition("/")
                targets[key] = _statistic(parameters[name], statistic, entry.shape, entry.dtype)
    return targets


def _sizes(groups: Sequence[Sequence[str]]) -> str:
    return f"{len(groups)} groups of {', '.join(str(len(group)) for group in groups)}"


def _statistic(parameter: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty statistic: divided like its parameter where it has the same shape, else repeated."""
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
    if name == "step" or not shape:
        # As torch's optimizers keep it; `load_state_dict` moves it where they want it.
        return torch.empty(shape, dtype=dtype)
    whole = torch.empty(shape, dtype=dtype, device=device)
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)


@torch.no_grad()
def give_back(
    model: nn.Module, optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """Hand filled tensors, and what is not a tensor, to the optimizers and the model."""
    extra = plain.get("model", {})
    for name, module in model.named_modules():
        key = f"{clean(name)}._extra_state".removeprefix(".")
        if key in extra:
            module.set_extra_state(extra[key])
    names = names_of(model)
    for number, optimizer in enumerate(optimizers):
        saved = plain["optimizers"][number]
        order = [name for group in _groups(optimizer, names) for name in group["params"]]
        state: dict[int, dict[str, Any]] = {n: dict(saved["values"].get(name, {})) for n, name in enumerate(order)}
        numbers = {name: n for n, name in enumerate(order)}
        prefix = f"optimizer/{number}/"
        for key, value in tensors.items():
            if key.startswith(prefix):
                name, _, statistic = key.removeprefix(prefix).rpartition("/")
                state[numbers[name]][statistic] = value
        groups = []
        for here, there in zip(_groups(optimizer, names), saved["groups"], strict=True):
            groups.append({**there, "params": [numbers[name] for name in here["params"]]})
        optimizer.load_state_dict({"state": {n: s for n, s in state.items() if s}, "param_groups": groups})
