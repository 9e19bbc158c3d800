"""One expert as a dense feed-forward and back: which tensor of `MLP` or `GLU` is which of a bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts.grouped import GroupedGLU, GroupedMLP
from moekit.transformer.feed_forward import GLU, MLP


@dataclass(frozen=True)
class DenseForm:
    """The tensors of a dense feed-forward that are those of an expert.

    Attributes:
        name: The dense feed-forward's name in messages.
        tensors: What each tensor of the bank is: the dense tensor, in which matrices lie transposed, and its part where
            several are held in one, in their order (None = it is whole).
    """

    name: str
    tensors: Mapping[str, tuple[str, int | None]]

    def expert(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One expert's tensors (without the dimension that counts experts) from those of a dense one that are there."""
        return {
            name: (dense[source] if part is None else dense[source][part]).t()
            for name, (source, part) in self.tensors.items()
            if source in dense
        }

    def dense(self, expert: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A dense feed-forward's tensors from one expert's."""
        found: dict[str, list[Tensor]] = {}
        for name, (target, _) in self.tensors.items():
            if name in expert:
                found.setdefault(target, []).append(expert[name].t())
        divided = {target for target, part in self.tensors.values() if part is not None}
        return {name: torch.stack(parts) if name in divided else parts[0] for name, parts in found.items()}


_MLP = DenseForm(
    "MLP",
    {
        "w_in": ("w_in.weight", None),
        "b_in": ("w_in.bias", None),
        "w_out": ("w_out.weight", None),
        "b_out": ("w_out.bias", None),
    },
)
_GLU = DenseForm("GLU", {"w_gate": ("w_in.weight", 0), "w_up": ("w_in.weight", 1), "w_out": ("w_out.weight", None)})
OUTPUT, OUTPUT_BIAS = "w_out", "b_out"
"""The tensors of either bank that write the result."""


def dense_form(bank: nn.Module, path: str) -> DenseForm:
    """The dense feed-forward that an expert of the bank equals.

    Raises:
        UserError: if there is none: other banks, and gated ones with biases inside.
    """
    if isinstance(bank, GroupedMLP):
        return _MLP
    if isinstance(bank, GroupedGLU) and bank.b_hidden is None:
        return _GLU
    raise UserError(
        f"an expert of {path} is no dense feed-forward of this package: got {type(bank).__name__}. GroupedMLP equals "
        "MLP, GroupedGLU without hidden bias equals GLU."
    )


def shared_form(branch: nn.Module) -> DenseForm | None:
    """The form of a shared branch that is a dense feed-forward itself; None = it is something else."""
    # The classes themselves: a derived one may compute something else.
    if type(branch) is MLP:
        return _MLP
    return _GLU if type(branch) is GLU else None
