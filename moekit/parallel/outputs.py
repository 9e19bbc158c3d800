"""What a unit returns: tensors that may be written to without the loss of the hooks that gather its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


def clone_output_views(unit: nn.Module) -> None:
    """Let `unit` return copies of views. To be called before `fully_shard` wraps it.

    `fully_shard` gathers the weights for backward in a hook on every tensor that a unit returns. Writing to a view in
    place (``h += x``) gives it a new history without that hook: weights are then not there when backward asks for them.
    Tensors that are no views keep their hooks.
    """
    unit.register_forward_hook(_without_views)


def _without_views(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map(_owned, output)


def _owned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value._is_view() and value.requires_grad else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # one that is no pytree
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        owned = tree_map(_owned, held)
        return value if all(owned[name] is held[name] for name in held) else dataclasses.replace(value, **owned)
    return value
