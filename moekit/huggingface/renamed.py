"""Parts and tensors that bear another name in state dicts than in the code that uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Renamed(nn.Module):
    """A module that keeps some attributes under other names: ``module.router`` is what `state_dict` calls ``gate``.

    A subclass inherits from this first, and sets `renamed` before the attributes are made.

    Attributes:
        renamed: the name in state dicts, by the name in code.
    """

    renamed: Mapping[str, str] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.renamed.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__.get("renamed", type(self).renamed)
        return super().__getattr__(found.get(name, name))

    def __delattr__(self, name: str) -> None:
        super().__delattr__(self.renamed.get(name, name))

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:  # noqa: D102
        super().register_buffer(self.renamed.get(name, name), tensor, persistent)
