"""Soft MoE: experts compute mixtures of tokens, tokens receive mixtures of what experts computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.component import Component
from moekit.experts.base import Experts
from moekit.functional.means import masked_mean
from moekit.functional.precision import without_autocast
from moekit.layer import MoEOutput
from moekit.routing import Compensation, Routing, RoutingContext


class SoftMoELayer(Component):
    """A layer of experts without a choice: every expert has S slots, and a slot's input is a mixture of all tokens.

    Of each sequence X Float[N, D] apart, with slot vectors Phi Float[D, E * S]:

        logits   = scale * normalise(X) normalise(Phi)      both to length 1
        slots    = softmax over tokens(logits)^T X          one row per slot
        computed = expert e on its own slots
        Y        = softmax over slots(logits) computed

    All is differentiable, balanced by construction and without drops, and costs what E * S tokens cost, however long
    the sequence. But every token's result depends on all tokens: it is for encoders.

    Returns a `MoEOutput` whose routing lists every pair of a real token and an expert, with the share of the token's
    result that came from the expert's slots as weight. The list is for statistics: it is not what `experts` was given.
    Statistics: ``entropy`` of that share (nats, mean over real tokens; log E = all experts alike) and ``slot_entropy``
    (mean over slots, of a slot's mixture of tokens). There are no losses to balance.

    Args:
        experts: any bank.
        slots: S, slots of each expert per sequence.
        allow_future: accept that a causal decoder's tokens see later ones.

    Raises:
        ValueError: if `slots` is not positive.

    Source: arXiv:2308.00951 section 2.1 and 2.3 (normalisation), Algorithm 1.
    Differs: padding is in no mixture and gets zeros; the softmaxes are float32.
    """

    requires_whole_bank = True
    expert_dims: ClassVar[Mapping[str, int]] = {"phi": 0}

    def __init__(self, experts: Experts, slots: int = 1, *, allow_future: bool = False) -> None:
        super().__init__()
        if slots < 1:
            raise ValueError(f"SoftMoELayer.slots must be at least 1: got {slots}.")
        self.experts, self.slots, self.allow_future = experts, slots, allow_future
        self.dim, self.num_experts = experts.dim, experts.num_experts
        self.phi = nn.Parameter(torch.empty(self.num_experts * slots, self.dim))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def extra_repr(self) -> str:  # noqa: D102
        return f"dim={self.dim}, num_experts={self.num_experts}, slots={self.slots}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the slot vectors anew (normal, of length about 1); the scale becomes 1."""
        self.phi.normal_(std=self.dim**-0.5)
        self.scale.fill_(1.0)

    def check_causal(self) -> None:
        """Raise ValueError unless the leak is wanted: decoders call this."""
        if not self.allow_future:
            raise ValueError(
                "SoftMoELayer mixes all tokens of a sequence, which leaks the future in a causal decoder. Use it in "
                "an encoder, use a MoELayer here, or accept the leak with allow_future=True."
            )

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `moekit.routing.Router.compensation`: all copies run, and their slots share the weight of one's."""
        return Compensation(choices=copies)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> MoEOutput:
        """Compute the layer.

        Args:
            x: Float[..., N, D]; each Float[N, D] is a sequence.
            context: its mask tells padding; fields have the leading shape of `x`, or are flat.
        """
        n, dim = x.shape[-2:]
        b = math.prod(x.shape[:-2])
        rows = x.reshape(b, n, dim)
        mask = None if context is None else context.flatten(b * n).mask
        real = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask.view(b, n)
        rows = rows.masked_fill(~real[:, :, None], 0.0)
        dispatch, combine = self._weights(rows, real)

        e, s = self.num_experts, self.slots
        wide = dispatch.dtype
        mixed = (dispatch.transpose(1, 2) @ rows.to(wide)).to(x.dtype)
        computed = self.experts(mixed.view(b, e, s, dim).transpose(0, 1).reshape(e, b * s, dim))
        computed = computed.view(e, b, s, dim).transpose(0, 1).reshape(b, e * s, dim)
        hidden = (combine @ computed.to(wide)).to(x.dtype)
        return MoEOutput(hidden.view(x.shape), self._routing(dispatch, combine, real))

    def _weights(self, rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Float32[B, N, E * S] twice: columns that sum to 1 over real tokens, rows that sum to 1; padding is 0."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        with without_autocast(rows.device):
            tokens = F.normalize(rows.to(wide), dim=-1)
            slots = F.normalize(self.phi.to(wide), dim=-1)
            logits = self.scale.to(wide) * (tokens @ slots.t())
        present = real[:, :, None]
        # Not -inf: the softmax over a sequence of nothing but padding would be NaN.
        dispatch = logits.masked_fill(~present, torch.finfo(wide).min).softmax(1) * present
        return dispatch, logits.softmax(-1) * present

    def _routing(self, dispatch: Tensor, combine: Tensor, real: Tensor) -> Routing:
        b, n, _ = combine.shape
        e, t = self.num_experts, b * n
        share = combine.view(t, e, self.slots).sum(-1)
        flat = real.reshape(-1)
        position = torch.where(flat, flat.cumsum(0) - 1, -1)
        with torch.no_grad():
            entropy = masked_mean(torch.special.entr(share).sum(-1), flat)
            used = real.any(1).sum() * e * self.slots
            slot_entropy = torch.special.entr(dispatch).sum() / used.clamp_min(1)
        return Routing(
            token=torch.arange(t, device=share.device).repeat(e),
            expert=torch.arange(e, device=share.device).repeat_interleave(t),
            weight=share.t().reshape(-1),
            position=position.repeat(e),
            kept=flat.repeat(e),
            statistics={"entropy": entropy, "slot_entropy": slot_entropy},
            num_tokens=t,
            num_experts=e,
        )
