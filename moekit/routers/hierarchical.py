"""Two-level gate: a noisy top-k over groups of experts, and another inside each chosen group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.functional.importance import importance_loss, selection_probability, squared_variation
from moekit.functional.ordered_sums import sum_by_index
from moekit.functional.precision import float32_linear, without_autocast
from moekit.kernels.grouped_mm import grouped_mm
from moekit.routers.queueing import clear_padding, mask_choices, routing_of_choices, score_statistics
from moekit.routing import Router, Routing, RoutingContext


class HierarchicalRouter(Router):
    """A groups of B experts: a primary gate chooses groups, the secondary gate of each chosen group its experts.

    weight(i, j) = G_primary(x)_i * G_i(x)_j, both noisy top-k gates (`NoisyTopKRouter`); expert j of group i has the
    number i * B + j. A token scores A + k_groups * B experts instead of A * B, which is why it was made for thousands
    of experts. Weights of a token sum to 1. All four matrices begin at zero.

    Args:
        dim: D.
        num_groups: A.
        group_size: B, experts in a group; E = A * B.
        k_groups: groups per token, at least 2.
        k_experts: experts per token in each of its groups, at least 2.

    Returns in `Routing.losses`: ``importance``, of the product weights over all E experts, and ``load``, the squared
    variation of Load_H(i, j) = Load_primary(i) * Load_i(X_i)_j / |X_i|, where X_i are the tokens that chose group i; in
    evaluation, without noise, of the plain counts. In `Routing.statistics`: ``entropy`` and ``logsumexp`` of the
    primary scores without noise. Dropless.

    Raises:
        ValueError: if `k_groups` is not in 2..A or `k_experts` not in 2..B.

    Source: arXiv:1701.06538 appendix B, eq. 12-17.
    Differs: no noise in evaluation.
    """

    shown = ("dim", "num_groups", "group_size", "k_groups", "k_experts")

    def __init__(
        self,
        dim: int,
        num_groups: int,
        group_size: int,
        *,
        k_groups: int = 2,
        k_experts: int = 2,
    ) -> None:
        super().__init__()
        for name, k, of, available in (
            ("k_groups", k_groups, "num_groups", num_groups),
            ("k_experts", k_experts, "group_size", group_size),
        ):
            if not 2 <= k <= available:
                raise ValueError(
                    f"HierarchicalRouter needs {name} between 2 and {of}: got {name}={k} and {of}={available}. The "
                    "softmax over one survivor is the constant 1 and teaches that gate nothing."
                )
        self.dim, self.num_groups, self.group_size = dim, num_groups, group_size
        self.num_experts = num_groups * group_size
        self.k_groups, self.k_experts = k_groups, k_experts
        self.weight = nn.Parameter(torch.empty(num_groups, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_groups, dim))
        self.secondary_weight = nn.Parameter(torch.empty(num_groups, group_size, dim))
        self.secondary_noise_weight = nn.Parameter(torch.empty(num_groups, group_size, dim))
        self.reset_parameters()

    @property
    def k(self) -> int:
        """Experts per token."""
        return self.k_groups * self.k_experts

    @property
    def multiplications_per_token(self) -> int:
        """See `Router.multiplications_per_token`: the gates of the groups, and those inside the groups of a token."""
        return 2 * self.dim * (self.num_groups + self.k_groups * self.group_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all matrices to zero: the start is pure noise."""
        for parameter in self.parameters():
            parameter.zero_()

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        context = context or RoutingContext()
        x = clear_padding(x, context.mask)
        t, k = x.shape[0], self.k
        clean = float32_linear(x, self.weight)
        scale = F.softplus(float32_linear(x, self.noise_weight))
        noisy = clean + torch.randn_like(clean) * scale if self.training else clean
        top, groups = noisy.topk(self.k_groups, dim=-1)

        # From here on a row is a token in one of its groups: all first groups, then all second ones.
        group = groups.t().reshape(-1)
        real = torch.ones(t, dtype=torch.bool, device=x.device) if context.mask is None else context.mask
        row_real = real.repeat(self.k_groups)
        inner, inner_scale = self._secondary(x, group)
        inner_noisy = inner + torch.randn_like(inner) * inner_scale if self.training else inner
        inner_top, inner_expert = inner_noisy.topk(self.k_experts, dim=-1)
        expert = group[:, None] * self.group_size + inner_expert
        weight = top.softmax(-1).t().reshape(-1, 1) * inner_top.softmax(-1)

        inside = (self.k_groups, t, self.k_experts)
        expert, weight = (rows.view(inside).transpose(0, 1).reshape(t, k) for rows in (expert, weight))
        requested = mask_choices(torch.ones_like(expert, dtype=torch.bool), context.mask)
        if self.training:
            primary = selection_probability(clean, noisy, scale, self.k_groups).masked_fill(~real[:, None], 0.0).sum(0)
            per_row = selection_probability(inner, inner_noisy, inner_scale, self.k_experts)
            per_row = per_row.masked_fill(~row_real[:, None], 0.0)
            secondary = sum_by_index(per_row, group, self.num_groups)
            size = per_row.new_zeros(self.num_groups).index_add(0, group, row_real.to(per_row.dtype))
            load = squared_variation(((primary / size.clamp_min(1))[:, None] * secondary).flatten())
        else:
            load = importance_loss(requested.to(weight.dtype), expert, self.num_experts)  # every assignment counts 1
        losses = {"importance": importance_loss(weight, expert, self.num_experts, requested), "load": load}
        statistics = score_statistics(clean, clean.softmax(-1), context.mask)
        return routing_of_choices(
            expert, weight, self.num_experts, mask=context.mask, losses=losses, statistics=statistics
        )

    def _secondary(self, x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Float32[R, B] scores and noise scales of rows, R = k_groups * T, at the gates of their ``group`` Int64[R]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = torch.cat([self.secondary_weight, self.secondary_noise_weight], dim=1).to(wide).transpose(1, 2)
        if x.device.type == "cuda":
            # A float32 product by groups would wait for their sizes; the gates of all groups are one small product.
            with without_autocast(x.device):
                every = (x.to(wide) @ weight.transpose(0, 1).flatten(1)).unflatten(1, (self.num_groups, -1))
            return self._scaled(every[torch.arange(group.numel(), device=x.device) % max(x.shape[0], 1), group])
        order = group.argsort(stable=True)
        counts = torch.zeros(self.num_groups, dtype=torch.int64, device=x.device)
        counts = counts.index_add(0, group, torch.ones_like(group))
        rows = x.to(wide).index_select(0, order % max(x.shape[0], 1))
        with without_autocast(x.device):
            both = grouped_mm(rows, weight.contiguous(), counts)
        return self._scaled(both.index_select(0, order.argsort()))

    def _scaled(self, both: Tensor) -> tuple[Tensor, Tensor]:
        scores, raw_scale = both.split(self.group_size, dim=1)
        return scores, F.softplus(raw_scale)
