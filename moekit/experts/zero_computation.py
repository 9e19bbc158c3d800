"""Experts that cost next to nothing: zero, copy and constant (MoE++)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from moekit.experts.base import Experts, product, rows_of
from moekit.functional.init import truncated_normal_
from moekit.functional.precision import without_autocast
from moekit.kernels.host_counts import on_host, split_counts

# Axes of the inner bank under names that nobody divides: the outer one's experts are others, and its results no sums.
_OWN = {"expert": "computing_expert", "mlp": "computing_mlp"}


class ZeroComputationExperts(Experts):
    """A bank of feed-forward experts, and behind them experts without a matrix product, so that easy tokens are cheap.

    In the order of their numbers:

        the experts of the bank
        zero      y = 0                                   (the token leaves the layer as it was)
        copy      y = x
        constant  y = a_1 x + a_2 v,  (a_1, a_2) = softmax(W x),  W Float[2, D], v Float[D] of each expert

    The router must choose from all of them. No row of a zero or copy expert is multiplied with anything; a constant
    expert's row costs 2 D products.

    Args:
        experts: the bank.
        zero: number of zero experts.
        copy: number of copy experts.
        constant: number of constant experts; the paper takes a fourth of the bank's number less the other two, at
            least one.

    Raises:
        ValueError: if a number is negative or all are 0.

    Source: arXiv:2410.07348 section 3.1.
    Differs: gating residuals are the router's (`moekit.routers.GatingResidual`); the smaller balance weight of these
        experts and their own capacity are not built. Expert parallelism refuses this bank, and tensor parallelism
        repeats it.
    """

    requires_whole_bank: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = (*Experts.shown, "zero", "copy", "constant")

    def __init__(self, experts: Experts, *, zero: int = 1, copy: int = 1, constant: int = 2) -> None:
        super().__init__()
        if min(zero, copy, constant) < 0 or zero + copy + constant == 0:
            raise ValueError(
                "ZeroComputationExperts needs numbers of experts that are not negative, and at least one: got "
                f"zero={zero}, copy={copy}, constant={constant}."
            )
        self.experts = experts
        self.zero, self.copy, self.constant = zero, copy, constant
        self.dim, self.num_experts = experts.dim, experts.num_experts + zero + copy + constant
        self.value = nn.Parameter(torch.empty(constant, self.dim)) if constant else None
        self.mix = nn.Parameter(torch.empty(constant, self.dim, 2)) if constant else None
        self.reset_parameters()

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        """Of the bank's parameters and the constants'."""
        inner = {
            f"experts.{name}": tuple(_OWN.get(axis, axis) for axis in axes) for name, axes in self.experts.axes.items()
        }
        return {**inner, "value": ("constant_expert", "embed"), "mix": ("constant_expert", "embed", "branch")}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the constants anew (normal); the bank draws its own weights."""
        if self.value is not None and self.mix is not None:
            self.value.normal_()
            truncated_normal_(self.mix, self.dim, 1.0)

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:  # noqa: D102
        n = self.experts.num_experts
        sizes = [n, self.zero, self.copy, self.constant]
        by_kind = None
        if counts is not None:
            by_kind = split_counts(counts, sizes)
            sizes = [int(on_host(kind).sum()) for kind in by_kind]
        computed, zero, copied, constant = rows.split(sizes)
        parts = [self.experts(computed, None if by_kind is None else by_kind[0]), torch.zeros_like(zero), copied]
        if self.value is not None and self.mix is not None:
            parts.append(self._constant(constant, None if by_kind is None else by_kind[3]))
        return torch.cat(parts)

    def _constant(self, rows: Tensor, counts: Tensor | None) -> Tensor:
        assert self.value is not None
        assert self.mix is not None
        wide = torch.promote_types(rows.dtype, torch.float32)
        with without_autocast(rows.device):
            share = product(rows.to(wide), self.mix.to(wide), counts).softmax(-1)
            value = rows_of(self.value.to(wide), rows, counts)
            return (share[..., :1] * rows + share[..., 1:] * value).to(rows.dtype)

    def reference(self, expert: int, x: Tensor) -> Tensor:  # noqa: D102
        n = self.experts.num_experts
        if expert < n:
            return self.experts.reference(expert, x)
        if expert < n + self.zero:
            return torch.zeros_like(x)
        if expert < n + self.zero + self.copy:
            return x
        assert self.value is not None
        assert self.mix is not None
        j = expert - n - self.zero - self.copy
        share = (x @ self.mix[j]).softmax(-1)
        return share[:, :1] * x + share[:, 1:] * self.value[j]
