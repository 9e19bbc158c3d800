"""What is in a checkpoint beside tensors: plain data, which is read back without executing anything."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_safe_globals

# What `save_hyperparameters` has noted of module and data, and their classes, which Lightning takes by name too.
_HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters", "hparams_type", "datamodule_hparams_type")

# What torch reads with ``weights_only``.
_LEAVES = (
    type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device,
)  # fmt: skip


def plain_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of Lightning that can be read back as data.

    Hyperparameters that are no plain data become text. NumPy's numbers become Python's, everywhere. What else is no
    plain data is the state of something that wants back what it gave, and is refused.

    Raises:
        TypeError: naming the place in the checkpoint, and the type.
    """
    return {
        key: _plain(value, (key,), _as_text if key in _HYPERPARAMETERS else _refuse)
        for key, value in checkpoint.items()
    }


def plain_state(state: Any, *path: Any) -> Any:
    """State of a part of the program as plain data; `path` says where it is in a checkpoint.

    Raises:
        TypeError: naming the place, and the type.
    """
    return _plain(state, path, _refuse)


def unplain(hyperparameters: Mapping[str, Any]) -> dict[str, str]:
    """Names and types of the hyperparameters that a checkpoint keeps as text."""
    found: dict[str, str] = {}

    def note(value: Any, path: tuple[Any, ...]) -> None:
        found[".".join(map(str, path))] = type(value).__name__

    _plain(hyperparameters, (), note)
    return found


def _as_text(value: Any, path: tuple[Any, ...]) -> str:
    """A path as a string, a class or function by its full name, anything else as Python shows it."""
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, functools.partial) or not hasattr(value, "__qualname__"):
        return repr(value)
    return f"{value.__module__}.{value.__qualname__}"


def _refuse(value: Any, path: tuple[Any, ...]) -> Any:
    where = "".join(f"[{key!r}]" for key in path)
    raise TypeError(
        "a checkpoint must hold numbers, strings, tensors, and lists and dictionaries of them: "
        f"checkpoint{where} is of type {type(value).__name__}. Save it in such a form, and make it anew when it is "
        "loaded."
    )


def _plain(tree: Any, path: tuple[Any, ...], otherwise: Callable[[Any, tuple[Any, ...]], Any]) -> Any:
    if isinstance(tree, Tensor) or type(tree) in _LEAVES or type(tree) in get_safe_globals():
        return tree
    if isinstance(tree, np.generic) and type(tree.item()) in _LEAVES:
        return tree.item()
    if type(tree) in (list, tuple, set):
        return type(tree)(_plain(value, (*path, n), otherwise) for n, value in enumerate(tree))
    if isinstance(tree, Mapping):
        kind = OrderedDict if type(tree) is OrderedDict else dict
        items = ((_plain(key, (*path, key), otherwise), _plain(v, (*path, key), otherwise)) for key, v in tree.items())
        return kind(items)
    return otherwise(tree, path)
