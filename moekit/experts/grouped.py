"""Feed-forward experts: the two-layer MLP and the gated linear unit, all experts of a layer in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moekit.experts.base import Experts, rows_of
from moekit.functional.activation import Activation, activation_function
from moekit.functional.dropout import activation_dropout, dropout
from moekit.functional.init import truncated_normal_

HiddenBias = Literal["none", "add", "multiply"]


class FeedForwardExperts(Experts):
    """What banks of feed-forwards share: their sizes, and how their weights are drawn.

    A subclass makes the parameters and then calls `reset_parameters`.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        activation: "relu" (Switch, GShard), "gelu" or "silu".
        dropout: probability on the hidden activations ("expert dropout": 0.4 in fine-tuning in arXiv:2101.03961
            section 2.4, where the rest of the model keeps 0.1).
        init_scale: variance scale of the truncated normal: 1.0, as dense feed-forwards start; 0.1 in arXiv:2101.03961
            table 3, for them as well.
    """

    outputs: ClassVar[tuple[str, ...]] = ("w_out",)

    def __init__(
        self, num_experts: int, dim: int, hidden_dim: int, *, activation: Activation, dropout: float, init_scale: float
    ) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        self.activation, self.dropout, self.init_scale = activation, dropout, init_scale
        self._act = activation_function(activation)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all matrices anew; biases become what changes nothing."""
        for name in self.matrices:
            if name in self.outputs:
                truncated_normal_(getattr(self, name), self.hidden_dim, self.init_scale * self.depth_scale)
            else:
                truncated_normal_(getattr(self, name), self.dim, self.init_scale)

    def _drop(self, hidden: Tensor) -> Tensor:
        return dropout(hidden, self.dropout, training=self.training)

    def _act_and_drop(self, hidden: Tensor) -> Tensor:
        return activation_dropout(hidden, self.activation, self.dropout, training=self.training)


class GroupedMLP(FeedForwardExperts):
    """E two-layer experts: y = activation(x W_in + b_in) W_out + b_out.

    The arguments that are not here are those of `FeedForwardExperts`.

    Args:
        bias: whether both layers have biases (fairseq and NLLB do; T5, Switch and ST-MoE do not).

    Source: arXiv:2101.03961 section 2. Experts are initialised independently.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "w_in": ("expert", "embed", "mlp"),
        "b_in": ("expert", "mlp"),
        "w_out": ("expert", "mlp", "embed"),
        "b_out": ("expert", "embed"),
    }
    matrices: ClassVar[tuple[str, ...]] = ("w_in", "w_out")

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        bias: bool = False,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(num_experts, dim, hidden_dim, activation=activation, dropout=dropout, init_scale=init_scale)
        self.w_in = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.b_in = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.b_out = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:  # noqa: D102
        super().reset_parameters()
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                bias.zero_()

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:  # noqa: D102
        hidden = self.times(rows, "w_in", counts)
        if self.b_in is not None:
            hidden = hidden + rows_of(self.b_in, rows, counts)
        hidden = self._act_and_drop(hidden)
        out = self.times(hidden, "w_out", counts)
        return out if self.b_out is None else out + rows_of(self.b_out, rows, counts)

    def reference(self, expert: int, x: Tensor) -> Tensor:  # noqa: D102
        hidden = x @ self.matrix(expert, "w_in")
        if self.b_in is not None:
            hidden = hidden + self.b_in[expert]
        out = self._act(hidden) @ self.matrix(expert, "w_out")
        return out if self.b_out is None else out + self.b_out[expert]


class GroupedGLU(FeedForwardExperts):
    """E gated experts: y = (activation(x W_gate) * (x W_up)) W_out, with a bias B on the hidden units if wanted.

    With "gelu" this is GEGLU (ST-MoE), with "silu" SwiGLU. It has three matrices: for the active parameters of a
    two-layer expert of hidden size F choose ``hidden_dim = 2 F / 3``.

    The arguments that are not here are those of `FeedForwardExperts`; the activation is the gate's, and dropout comes
    after the bias.

    Args:
        hidden_bias: what is done with B, Float[E, F], before W_out: "none", "add" (starts at 0) or "multiply" (starts
            at 1: +0.008 in quality in the paper, where "add" lost 0.002).

    Raises:
        ValueError: if `hidden_bias` is none of the three.

    Source: arXiv:2002.05202 eq. 6; arXiv:2202.08906 appendix B (also "expert biases", additive and multiplicative).
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "w_gate": ("expert", "embed", "mlp"),
        "w_up": ("expert", "embed", "mlp"),
        "b_hidden": ("expert", "mlp"),
        "w_out": ("expert", "mlp", "embed"),
    }
    matrices: ClassVar[tuple[str, ...]] = ("w_gate", "w_up", "w_out")

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        hidden_bias: HiddenBias = "none",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(num_experts, dim, hidden_dim, activation=activation, dropout=dropout, init_scale=init_scale)
        if hidden_bias not in ("none", "add", "multiply"):
            raise ValueError(f'hidden_bias must be "none", "add" or "multiply": got {hidden_bias!r}.')
        self.hidden_bias = hidden_bias
        self.w_gate = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w_up = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.b_hidden = None if hidden_bias == "none" else nn.Parameter(torch.empty(num_experts, hidden_dim))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:  # noqa: D102
        super().reset_parameters()
        if self.b_hidden is not None:
            self.b_hidden.fill_(1.0 if self.hidden_bias == "multiply" else 0.0)

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:  # noqa: D102
        hidden = self._act(self.times(rows, "w_gate", counts)) * self.times(rows, "w_up", counts)
        if self.b_hidden is not None:
            hidden = self._biased(hidden, rows_of(self.b_hidden, rows, counts))
        return self.times(self._drop(hidden), "w_out", counts)

    def reference(self, expert: int, x: Tensor) -> Tensor:  # noqa: D102
        hidden = self._act(x @ self.matrix(expert, "w_gate")) * (x @ self.matrix(expert, "w_up"))
        if self.b_hidden is not None:
            hidden = self._biased(hidden, self.b_hidden[expert])
        return hidden @ self.matrix(expert, "w_out")

    def _biased(self, hidden: Tensor, bias: Tensor) -> Tensor:
        return hidden * bias if self.hidden_bias == "multiply" else hidden + bias
