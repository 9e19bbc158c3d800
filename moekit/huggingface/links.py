"""Where each of our tensors lies in a checkpoint of Hugging Face transformers, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["same", "parts", "experts", "transposed experts"]


@dataclass(frozen=True)
class Link:
    """One of our tensors and theirs.

    Attributes:
        ours: its name in our state dict; "" where we have no such tensor and theirs are zeros (biases).
        theirs: names; one, or one for each entry of our first dimension.
        form: "same" = one tensor like ours; "parts" = one for each entry of our first dimension; "experts" = likewise,
            by expert; "transposed experts" = and its matrices are transposed.
        factors: theirs = ours times a factor, one for each of `theirs`; () = all 1.
        shape: of ours where it is absent.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form = "same"
    factors: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether values pass unchanged."""
        return all(factor == 1 for factor in self.factors)

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of theirs, where ours is `shape`."""
        one = tuple(shape) if self.form == "same" else tuple(shape)[1:]
        return dict.fromkeys(self.theirs, one[::-1] if self.form == "transposed experts" else one)

    def to_theirs(self, tensor: Tensor) -> dict[str, Tensor]:
        """Theirs, contiguous, from ours."""
        pieces = (tensor,) if self.form == "same" else tensor.unbind(0)
        if self.form == "transposed experts":
            pieces = tuple(piece.t() for piece in pieces)
        scaled = [piece if f == 1 else piece * f for piece, f in zip(pieces, self._all(), strict=True)]
        return {name: piece.contiguous() for name, piece in zip(self.theirs, scaled, strict=True)}

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Ours from theirs."""
        pieces = [t if f == 1 else t / f for t, f in zip((tensors[n] for n in self.theirs), self._all(), strict=True)]
        if self.form == "transposed experts":
            pieces = [piece.t() for piece in pieces]
        return pieces[0].clone() if self.form == "same" else torch.stack(pieces)

    def _all(self) -> tuple[float, ...]:
        return self.factors or (1.0,) * len(self.theirs)
