"""Gated experts whose gate and up projections are one tensor, as published sparse language models keep them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.experts.base import Experts, rows_of
from moekit.functional.init import truncated_normal_


class Gate(ABC):
    """Joins the two halves of what the gate-up projection gives."""

    @abstractmethod
    def __call__(self, gate_up: Tensor) -> Tensor:
        """Float[..., 2F] to Float[..., F]."""


@dataclass(frozen=True)
class HalvesGate(Gate):
    """activation(first half) * second half.

    Attributes:
        activation: a function of a tensor; `torch.nn.functional.silu` makes SwiGLU.

    Source: arXiv:2002.05202 eq. 6.
    """

    activation: Callable[[Tensor], Tensor] = F.silu

    def __call__(self, gate_up: Tensor) -> Tensor:  # noqa: D102
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up


@dataclass(frozen=True)
class ClampedGate(Gate):
    """(up + 1) * gate * sigmoid(alpha * gate), both clamped; gate and up are the even and the odd channels.

    Attributes:
        alpha: slope of the sigmoid.
        limit: the gate is at most this; up lies within plus and minus this.

    Source: the released code of GPT-OSS.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate_up: Tensor) -> Tensor:  # noqa: D102
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class GateUpExperts(Experts):
    """E gated experts: y = gate(x W_gate_up + b) W_down + b.

    The same function as `GroupedGLU` where the gate is `HalvesGate` and there are no biases. Here the two projections
    are one tensor and one product, and tensors have the names and the shapes that transformers has for them, so that
    weights need no conversion.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        gate: how the two halves of the projection become hidden units; None = SwiGLU.
        bias: whether both layers have biases.
        outputs_first: whether matrices lie as those of `torch.nn.Linear` do, Float[E, 2F, D] and Float[E, D, F]; else
            Float[E, D, 2F] and Float[E, F, D].

    Source: the layout of transformers 5. Differs: the hidden units are no axis "mlp": gate and up share a dimension, so
        that a slice of it would be no slice of the hidden units. Tensor parallelism leaves these experts whole.
    """

    matrices: ClassVar[tuple[str, ...]] = ("gate_up_proj", "down_proj")

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        gate: Gate | None = None,
        bias: bool = False,
        outputs_first: bool = True,
    ) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        self.gate = gate or HalvesGate()
        self.outputs_first = outputs_first
        up, down = (2 * hidden_dim, dim), (dim, hidden_dim)
        if not outputs_first:
            up, down = up[::-1], down[::-1]
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, *up))
        self.down_proj = nn.Parameter(torch.empty(num_experts, *down))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.reset_parameters()

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        """See `Experts`."""
        up, down = ("gate_up", "embed"), ("embed", "hidden")
        if not self.outputs_first:
            up, down = up[::-1], down[::-1]
        return {
            "gate_up_proj": ("expert", *up),
            "down_proj": ("expert", *down),
            "gate_up_proj_bias": ("expert", "gate_up"),
            "down_proj_bias": ("expert", "embed"),
            **self.__dict__.get("axes", {}),  # of adapters
        }

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, gate={self.gate}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both matrices anew; biases become 0."""
        truncated_normal_(self.gate_up_proj, self.dim, 1.0)
        truncated_normal_(self.down_proj, self.hidden_dim, self.depth_scale)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                bias.zero_()

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:  # noqa: D102
        hidden = self.times(rows, "gate_up_proj", counts)
        if self.gate_up_proj_bias is not None:
            hidden = hidden + rows_of(self.gate_up_proj_bias, rows, counts)
        out = self.times(self.gate(hidden), "down_proj", counts)
        return out if self.down_proj_bias is None else out + rows_of(self.down_proj_bias, rows, counts)

    def reference(self, expert: int, x: Tensor) -> Tensor:  # noqa: D102
        hidden = x @ self.matrix(expert, "gate_up_proj")
        if self.gate_up_proj_bias is not None:
            hidden = hidden + self.gate_up_proj_bias[expert]
        out = self.gate(hidden) @ self.matrix(expert, "down_proj")
        return out if self.down_proj_bias is None else out + self.down_proj_bias[expert]
