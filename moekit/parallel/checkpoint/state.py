"""The state of a model as one flat dictionary of tensors, and the rest as plain data.

Names do not depend on the layout: ``model/<parameter>``, with the parameter's name as in a plain model. What wrappers
insert into names is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.errors import UserError
from moekit.parallel.checkpoint.index import Index, StoredTensor

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_TENSOR = "__tensor__"


def clean(name: str) -> str:
    """A parameter's name without what wrappers insert."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def extract_dtensors(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`tree` with every DTensor in it moved to `tensors`, under the name of its place in the tree."""
    if isinstance(tree, DTensor):
        tensors[path] = tree.detach()
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        return {key: extract_dtensors(value, tensors, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(extract_dtensors(value, tensors, f"{path}/{n}") for n, value in enumerate(tree))
    return tree


def insert_dtensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `extract_dtensors`."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: insert_dtensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(insert_dtensors(value, tensors) for value in tree)
    return tree


def extra_targets(model: nn.Module, index: Index) -> dict[str, Tensor]:
    """Empty tensors for what `extract_dtensors` found: sharded like the model's tensor of that name and shape."""
    own = model_tensors(model)[0]
    return {
        f"extra/{name}": _empty_like(own.get(clean(name.rpartition("/")[2])), entry)
        for name, entry in index.under("extra/").items()
    }


def _empty_like(like: Tensor | None, entry: StoredTensor) -> Tensor:
    """Sharded like a tensor of its shape; whole, on the CPU, where there is none."""
    if like is None or tuple(like.shape) != entry.shape:
        return entry.empty()
    return torch.empty_like(like, dtype=entry.dtype)


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
    """What a model's state dict, or an edited one of it, holds, by names that no wrapper has changed.

    Returns:
        Tensors, shared ones once; what a module saves that is no tensor; further names of shared tensors -> the name
        that they are among the tensors.
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
            tensors[name] = value
        else:
            other[name] = value
    return tensors, other, shared


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same memory: an edit may have parted what a model shares."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (one, other))
    return a.data_ptr() == b.data_ptr()


def model_targets(model: nn.Module, index: Index, *, others: bool = False) -> dict[str, Tensor]:
    """Empty tensors for a checkpoint's model, sharded as the model's of the same name and shape.

    With `others` also whole ones, on the CPU, for tensors that the model has not, or not in this shape.
    """
    own, _, shared = model_tensors(model)
    targets: dict[str, Tensor] = {}
    for name, entry in index.under("model/").items():
        like = own.get(shared.get(name, name))
        if others or (like is not None and tuple(like.shape) == entry.shape):
            targets[f"model/{name}"] = _empty_like(like, entry)
    return targets


def state_dict_from(model: nn.Module, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for the model, under its own names: ``model/<name>`` of `tensors`, and what `plain` has of it."""
    values: dict[str, Any] = {name.removeprefix("model/"): t for name, t in tensors.items() if name[:6] == "model/"}
    values |= plain.get("model", {})
    for name, first in (plain.get("shared", {}) | aliases(model)).items():
        if name not in values and first in values:
            values[name] = values[first]
    own = {clean(name): name for name in model.state_dict()}
    return {own.get(name, name): value for name, value in values.items()}


def require_same_model(own: Mapping[str, Any], state: Mapping[str, Any], where: str, *, strict: bool = True) -> None:
    """Check that `state` is a state dict of the model whose own one is `own`; unless `strict`, by shapes alone.

    Raises:
        UserError: If it is of another model.
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
    """Check that a checkpoint holds the model's tensors, all and no others, shared as they are.

    Raises:
        UserError: If it is of another model.
    """
    for name, first in aliases(model).items():
        if f"model/{name}" in index.entries:
            raise UserError(
                f"the checkpoint {where} is of another model: it has {first} and {name} apart, which are one tensor "
                "here. Build the model that was saved."
            )
    held = {key: entry.empty("meta") for key, entry in index.entries.items()}
    there = state_dict_from(model, held, {"shared": plain.get("shared", {})})
    require_same_model({n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}, there, where)


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {clean(name): tuple(v.shape) if isinstance(v, Tensor) else None for name, v in state.items()}


def _list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}" if names else "(nothing)"
