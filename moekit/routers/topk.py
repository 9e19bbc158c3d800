"""Top-k token choice: every token picks its k best experts by a softmax over a linear score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.functional.assignment import queue_positions, service_order
from moekit.functional.losses import BalanceScope, load_balance, router_z
from moekit.routing import Capacity, Router, Routing, RoutingContext

Renormalise = Literal["none", "before_drop", "after_drop"]
ChoicePolicy = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Balance:
    """How the load-balancing loss counts.

    Attributes:
        count: "first" counts first choices only (GShard, Mesh-TensorFlow, fairseq), "all" counts all k.
        when: "before_drop" counts what asked for a place in a queue, "after_drop" what was computed.
        scope: see `moekit.functional.load_balance`.
    """

    count: Literal["first", "all"] = "first"
    when: Literal["before_drop", "after_drop"] = "before_drop"
    scope: BalanceScope = "batch"

    def __post_init__(self) -> None:
        allowed = {
            "count": ("first", "all"),
            "when": ("before_drop", "after_drop"),
            "scope": ("batch", "sequence", "global"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"Balance.{name} must be one of {', '.join(values)}: got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class RandomChoice:
    """Send a later choice with probability ``min(1, weight / threshold)``.

    Threshold 0.5 is GShard's rule "2 g2 > U(0, 1)" (arXiv:2006.16668 Algorithm 1); 0.2 is ST-MoE's
    (arXiv:2202.08906 appendix C). In training only: in evaluation every choice is sent.

    Differs: a choice that is not sent takes no place in its expert's queue. Algorithm 1 raises the expert's counter
    for every second choice, sent or not, and so leaves slots empty.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"RandomChoice.threshold must be in (0, 1]: got {self.threshold}.")

    def __call__(self, weight: Tensor) -> Tensor:
        """Bool of the shape of `weight`: which choices are sent."""
        return weight.detach() > torch.rand_like(weight) * self.threshold


class TopKRouter(Router):
    """Softmax over a linear score, k best experts, weight = probability.

    logits = x W_r; p = softmax(logits) over ALL experts; the k largest are the choices (so k = 1 keeps a gradient to
    the router); arithmetic in float32 ("selective precision").

    Args:
        dim: D.
        num_experts: E.
        k: choices per token.
        capacity: slots per expert and who is served first; dropless by default.
        renormalise: whether the k weights of a token are scaled to sum to 1: "none", "before_drop" (a dropped choice
            takes its weight along: GShard, ST-MoE) or "after_drop" (the surviving choices share it: fairseq,
            DeepSpeed).
        later_choices: which of the choices after the first are sent in training; None = all.
        jitter: multiply the router's input (not the experts') by U(1 - jitter, 1 + jitter) in training.
        balance: how the load-balancing loss counts.
        init_scale: variance scale of the truncated normal init (arXiv:2101.03961 table 3).
        allow_future: accept priorities that look at later tokens in a causal decoder.

    Returns in `Routing.losses`: ``load_balance`` and ``router_z``; in `Routing.statistics`: ``entropy`` (nats, mean
    over real tokens) and ``logsumexp``. Assignments are listed choice-major: all first choices, then all second.

    Source: arXiv:2101.03961 section 2.1 and 2.4; arXiv:2006.16668 Algorithm 1; arXiv:2202.08906 section 3.
    Differs: jitter multiplies the router's input, as in the authors' code; the pseudo-code of arXiv:2101.03961 adds
        it to the logits. Later choices take their place after all first choices, kept or not (Algorithm 1 counts
        overflow too). In evaluation nothing is random and, by default, nothing is dropped.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        capacity: Capacity | None = None,
        renormalise: Renormalise = "none",
        later_choices: ChoicePolicy | None = None,
        jitter: float = 0.0,
        balance: Balance | None = None,
        init_scale: float = 0.1,
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(
                f"k must be between 1 and num_experts: got k={k} and num_experts={num_experts}. A token cannot "
                "choose more experts than there are."
            )
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be in [0, 1): got {jitter}. The papers use 0.01.")
        if renormalise not in ("none", "before_drop", "after_drop"):
            raise ValueError(f'renormalise must be "none", "before_drop" or "after_drop": got {renormalise!r}.')
        if k == 1 and renormalise != "none":
            raise ValueError(
                f"renormalise={renormalise!r} with k=1 makes every weight exactly 1 and leaves the router without a "
                'gradient from the task. Use "none".'
            )
        self.dim, self.num_experts, self.k = dim, num_experts, k
        self.capacity = capacity or Capacity()
        self.renormalise, self.later_choices, self.jitter = renormalise, later_choices, jitter
        self.balance = balance or Balance()
        self.init_scale = init_scale
        self.allow_future = allow_future
        self.looks_ahead = self.capacity.looks_ahead
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the scores' weights anew: truncated normal of std sqrt(init_scale / dim)."""
        if self.weight.device.type != "meta":
            std = (self.init_scale / self.dim) ** 0.5
            nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}, capacity={self.capacity}"

    def logits(self, x: Tensor) -> Tensor:
        """Float32[T, E] scores of ``x`` Float[T, D], jittered in training."""
        wide = torch.promote_types(x.dtype, torch.float32)
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else _nothing():
            x = x.to(wide)
            if self.training and self.jitter > 0:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(x, self.weight.to(wide))

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Route; see `Router.forward`."""
        context = context or RoutingContext()
        t = x.shape[0]
        if context.mask is not None:
            # Padding may hold anything, even NaN (attention over nothing), and zero times NaN is NaN: clear it first.
            x = x.masked_fill(~context.mask[:, None], 0.0)
        logits = self.logits(x)
        probs = logits.softmax(-1)
        top_probs, expert = probs.topk(self.k, dim=-1)

        weight = top_probs
        if self.renormalise == "before_drop":
            weight = weight / weight.sum(-1, keepdim=True)
        wanted = torch.ones_like(expert, dtype=torch.bool)
        if self.later_choices is not None and self.training and self.k > 1:
            later = self.later_choices(weight[:, 1:])
            wanted = torch.cat([wanted[:, :1], later], dim=1)
        if context.mask is not None:
            wanted = wanted & context.mask[:, None]

        queued = wanted.t().reshape(-1)
        flat_expert = expert.t().reshape(-1)
        slots = self.capacity.slots(t, self.num_experts, self.k, training=self.training)
        priority = self.capacity.priority if slots is not None else "position"
        if priority == "random" and not self.training:
            priority = "position"
        order = service_order(top_probs.detach().t(), priority)
        position = queue_positions(flat_expert, queued, self.num_experts, order)
        kept = queued if slots is None else queued & (position < slots)

        kept_tk = kept.view(self.k, t).t()
        if self.renormalise == "after_drop":
            surviving = weight * kept_tk
            weight = surviving / surviving.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        return Routing(
            token=torch.arange(t, device=x.device).repeat(self.k),
            expert=flat_expert,
            weight=weight.t().reshape(-1),
            position=position,
            kept=kept,
            losses=self._losses(
                logits, probs, expert, kept_tk if self.balance.when == "after_drop" else wanted, context
            ),
            statistics=_statistics(logits, probs, context.mask),
            num_tokens=t,
            num_experts=self.num_experts,
            capacity=slots,
        )

    def _losses(
        self, logits: Tensor, probs: Tensor, expert: Tensor, counted: Tensor, context: RoutingContext
    ) -> dict[str, Tensor]:
        choices = 1 if self.balance.count == "first" else self.k
        balance = load_balance(
            probs,
            expert[:, :choices],
            counted[:, :choices],
            mask=context.mask,
            sequence=context.sequence,
            scope=self.balance.scope,
        )
        return {"load_balance": balance, "router_z": router_z(logits, context.mask)}


class _nothing:  # noqa: N801
    """A context manager that does nothing (`contextlib.nullcontext` breaks a full graph on older compilers)."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: object) -> None:
        return None


@torch.no_grad()
def _statistics(logits: Tensor, probs: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Mean entropy and mean logsumexp over real tokens."""
    entropy = torch.special.entr(probs).sum(-1)
    lse = torch.logsumexp(logits, dim=-1)
    if mask is None:
        n = max(logits.shape[0], 1)
        return {"entropy": entropy.sum() / n, "logsumexp": lse.sum() / n}
    real = mask.sum().clamp_min(1)
    return {"entropy": (entropy * mask).sum() / real, "logsumexp": (lse * mask).sum() / real}
