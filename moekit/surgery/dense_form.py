"""One expert as a dense feed-forward and back: which tensor of `MLP` or `GLU` is which of a bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts.grouped import GroupedGLU, GroupedMLP


@dataclass(frozen=True)
class DenseForm:
    """The tensors of a dense feed-forward that are those of an expert.

    Attributes:
        name: The dense feed-forward's name in messages.
        tensors: What each tensor of the bank is: the dense tensor, its part where several are held in one (None = it is
            whole), and whether it lies there transposed.
        output: The bank's matrix that writes the result.
        output_bias: The bias of that matrix.
    """

    name: str
    tensors: Mapping[str, tuple[str, int | None, bool]]
    output: str = "w_out"
    output_bias: str = "b_out"

    def expert(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One expert's tensors (without the dimension that counts experts) from a dense feed-forward's; absent ones
        stay absent.
        """
        found = {}
        for name, (source, part, transposed) in self.tensors.items():
            if source in dense:
                tensor = dense[source] if part is None else dense[source][part]
                found[name] = tensor.t() if transposed else tensor
        return found

    def dense(self, expert: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A dense feed-forward's tensors from one expert's."""
        parts: dict[str, dict[int | None, Tensor]] = {}
        for name, (target, part, transposed) in self.tensors.items():
            if name in expert:
                parts.setdefault(target, {})[part] = expert[name].t() if transposed else expert[name]
        return {
            target: found[None] if None in found else torch.stack([found[n] for n in sorted(found, key=int_of)])
            for target, found in parts.items()
        }


def int_of(part: int | None) -> int:
    """The number of a part."""
    assert part is not None, "a tensor has parts or is whole"
    return part


_MLP = DenseForm(
    "MLP",
    {
        "w_in": ("w_in.weight", None, True),
        "b_in": ("w_in.bias", None, False),
        "w_out": ("w_out.weight", None, True),
        "b_out": ("w_out.bias", None, False),
    },
)
_GLU = DenseForm(
    "GLU",
    {
        "w_gate": ("w_in.weight", 0, True),
        "w_up": ("w_in.weight", 1, True),
        "w_out": ("w_out.weight", None, True),
    },
)


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
