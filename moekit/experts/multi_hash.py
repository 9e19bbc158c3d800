"""Segments of a feed-forward's hidden dimension as experts of their own, for MultiHash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from moekit.experts.grouped import FeedForwardExperts
from moekit.functional.activation import Activation


class MultiHashMLP(FeedForwardExperts):
    """K * E segment experts of hidden size F / K; a token's K segments make up one feed-forward of hidden size F.

    Segment m of expert e is number ``m * E + e``, as `moekit.routers.HashRouter` with K tables numbers them. With its
    weights of 1, for a token whose m-th hash is k_m:

        v_m = activation(x A_{m, k_m}),  y = sum_m v_m B_{m, k_m}

    which is [B_1; ...; B_K] applied to the concatenation [v_1, ..., v_K].

    The arguments that are not here are those of `FeedForwardExperts`; the output's fan-in is F, as in a whole
    feed-forward.

    Args:
        num_experts: E of each table.
        hidden_dim: F, divisible by K.
        num_segments: K.

    Raises:
        ValueError: if K does not divide F.

    Source: arXiv:2106.04426. Differs: every segment of the second matrix reads its own segment of the
        hidden layer and results are added; segments that each read the whole hidden layer and make a part of the output
        would have to meet between the two products.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "w_in": ("expert", "embed", "mlp"),
        "w_out": ("expert", "mlp", "embed"),
    }
    matrices: ClassVar[tuple[str, ...]] = ("w_in", "w_out")
    shown: ClassVar[tuple[str, ...]] = (*FeedForwardExperts.shown, "num_segments")

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        num_segments: int = 2,
        activation: Activation = "relu",
        dropout: float = 0.0,
        init_scale: float = 1.0,
    ) -> None:
        if num_segments < 1 or hidden_dim % num_segments:
            raise ValueError(
                f"hidden_dim must be divisible by num_segments: got {hidden_dim} and {num_segments}. Each segment "
                "has hidden_dim / num_segments hidden units."
            )
        super().__init__(
            num_experts * num_segments, dim, hidden_dim, activation=activation, dropout=dropout, init_scale=init_scale
        )
        self.num_segments = num_segments
        self.w_in = nn.Parameter(torch.empty(self.num_experts, dim, hidden_dim // num_segments))
        self.w_out = nn.Parameter(torch.empty(self.num_experts, hidden_dim // num_segments, dim))
        self.reset_parameters()

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:  # noqa: D102
        hidden = self._act_and_drop(self.times(rows, "w_in", counts))
        return self.times(hidden, "w_out", counts)

    def reference(self, expert: int, x: Tensor) -> Tensor:  # noqa: D102
        return self._act(x @ self.matrix(expert, "w_in")) @ self.matrix(expert, "w_out")
