"""Activations by name, for dense feed-forwards and experts alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "gelu", "silu"]


def _gelu(x: Tensor) -> Tensor:
    # At the top of the module and not a lambda: a module that holds one cannot be pickled.
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": _gelu, "silu": F.silu}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; "gelu" is its tanh form.

    Raises:
        ValueError: if there is none.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}: got {name!r}.")
    return _ACTIVATIONS[name]
