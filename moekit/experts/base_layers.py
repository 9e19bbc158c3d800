"""Experts of BASE layers: each a stack of pre-norm residual feed-forward blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.experts.base import Experts, product, rows_of
from moekit.functional.activation import Activation, activation_function
from moekit.functional.init import truncated_normal_


class BASELayerStack(Experts):
    """E stacks of L blocks ``h <- h + activation(LN(h) W_in + b_in) W_out + b_out``, f(h) being the last h.

    Returns what the stack ADDS: f(h) - h. So with a router's weight alpha and the residual around the layer the result
    is h + alpha (f(h) - h) = alpha f(h) + (1 - alpha) h, and a token that reaches no expert passes unchanged. The last
    matrix of every block starts at zero: the layer starts as the identity.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F; 4 D in the paper.
        num_layers: L; 10 in the paper's single layer, 1 is the default of the authors' code.
        activation: "relu" in the paper.
        bias: whether both matrices have biases, as in the authors' code.
        init_scale: variance scale of the truncated normal of the first matrix; 1/3 is the variance of `nn.Linear`.
        output_scale: that of the second; 0 = zeros, as in the authors' code.
        eps: number that the norms add to the variance.

    Raises:
        ValueError: if `num_layers` is less than 1.

    Source: arXiv:2103.16716 (expert modules), and the authors' code for alpha f(h) + (1 - alpha) h and for the zeros.
        Differs: with f as its residual stack, eq. 1 of the paper read by the letter is alpha f(h) + h, which counts h
        1 + alpha times; the code does not, and neither do we. The second bias starts at zero too.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "norm_gain": ("expert", "layer", "embed"),
        "norm_shift": ("expert", "layer", "embed"),
        "w_in": ("expert", "layer", "embed", "mlp"),
        "b_in": ("expert", "layer", "mlp"),
        "w_out": ("expert", "layer", "mlp", "embed"),
        "b_out": ("expert", "layer", "embed"),
    }

    shown: ClassVar[tuple[str, ...]] = (*Experts.shown, "num_layers")

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        num_layers: int = 1,
        activation: Activation = "relu",
        bias: bool = True,
        init_scale: float = 1 / 3,
        output_scale: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"BASELayerStack needs at least one block: got num_layers={num_layers}.")
        self.num_experts, self.dim, self.hidden_dim, self.num_layers = num_experts, dim, hidden_dim, num_layers
        self.activation, self.eps = activation, eps
        self.init_scale, self.output_scale = init_scale, output_scale
        self._act = activation_function(activation)
        stack = (num_experts, num_layers)
        self.norm_gain = nn.Parameter(torch.empty(*stack, dim))
        self.norm_shift = nn.Parameter(torch.empty(*stack, dim))
        self.w_in = nn.Parameter(torch.empty(*stack, dim, hidden_dim))
        self.w_out = nn.Parameter(torch.empty(*stack, hidden_dim, dim))
        self.b_in = nn.Parameter(torch.empty(*stack, hidden_dim)) if bias else None
        self.b_out = nn.Parameter(torch.empty(*stack, dim)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Norms to one and zero, first matrices drawn anew, last ones zero unless `output_scale` says otherwise."""
        self.norm_gain.fill_(1.0)
        self.norm_shift.zero_()
        truncated_normal_(self.w_in, self.dim, self.init_scale)
        if self.output_scale > 0:
            truncated_normal_(self.w_out, self.hidden_dim, self.output_scale)
        else:
            self.w_out.zero_()
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                bias.zero_()

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:  # noqa: D102
        added = torch.zeros_like(rows)
        for gain, shift, w_in, b_in, w_out, b_out in self._blocks():
            normed = F.layer_norm(rows + added, (self.dim,), eps=self.eps)
            normed = normed * rows_of(gain, rows, counts) + rows_of(shift, rows, counts)
            hidden = product(normed, w_in, counts)
            if b_in is not None:
                hidden = hidden + rows_of(b_in, rows, counts)
            added = added + product(self._act(hidden), w_out, counts)
            if b_out is not None:
                added = added + rows_of(b_out, rows, counts)
        return added

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]]:
        """The parameters of each block for all experts."""
        # unbind, not [:, l]: the backward of an index would fill a whole gradient for every block.
        none = [None] * self.num_layers
        yield from zip(
            self.norm_gain.unbind(1),
            self.norm_shift.unbind(1),
            self.w_in.unbind(1),
            none if self.b_in is None else self.b_in.unbind(1),
            self.w_out.unbind(1),
            none if self.b_out is None else self.b_out.unbind(1),
            strict=True,
        )

    def reference(self, expert: int, x: Tensor) -> Tensor:  # noqa: D102
        h = x
        for block in range(self.num_layers):
            gain, shift = self.norm_gain[expert, block], self.norm_shift[expert, block]
            hidden = F.layer_norm(h, (self.dim,), gain, shift, self.eps) @ self.w_in[expert, block]
            if self.b_in is not None:
                hidden = hidden + self.b_in[expert, block]
            h = h + self._act(hidden) @ self.w_out[expert, block]
            if self.b_out is not None:
                h = h + self.b_out[expert, block]
        return h - x
