"""One pre-norm transformer block; its feed-forward may be any module."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from moekit.component import Component
from moekit.functional.dropout import add_dropped
from moekit.layer import MoEOutput
from moekit.routing import Routing, RoutingContext
from moekit.transformer.attention import AttentionPlan, CrossAttention, SelfAttention
from moekit.transformer.cache import LayerCache
from moekit.transformer.output import BlockOutput


@runtime_checkable
class RoutedFeedForward(Protocol):
    """A feed-forward that routes tokens: it is told the context, and asked whether it may stand in a decoder."""

    num_experts: int

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> MoEOutput:
        """Compute Float[..., D]; context fields are ``[T]``."""

    def check_causal(self) -> None:
        """Raise ValueError if a token's result may depend on later tokens."""


class Block(Component):
    """Self-attention, cross-attention where there is a memory, feed-forward: each x + dropout(f(norm(x))).

    Args:
        self_attention: attention over the sequence itself.
        feed_forward: any module from Float[..., D] to the same shape, or one with a `check_causal` method that takes
            ``(x, context)`` and returns a `MoEOutput`, such as `MoELayer`.
        norms: one per branch, in the order of computation.
        cross_attention: attention over a memory, or None.
        dropout: probability on every branch's output.
        extra: one more feed-forward, a dense one, as a branch of its own (ST-MoE's sparse-dense block).
        extra_order: whether `extra` comes "after" or "before" the feed-forward.

    Raises:
        ValueError: if there is not one norm for each branch.
        TypeError: if `extra` routes: a block returns one routing.

    Source: pre-norm arXiv:2002.04745; extra feed-forward arXiv:2202.08906 appendix C.
    """

    def __init__(
        self,
        self_attention: SelfAttention,
        feed_forward: nn.Module,
        *,
        norms: tuple[nn.Module, ...],
        cross_attention: CrossAttention | None = None,
        dropout: float = 0.0,
        extra: nn.Module | None = None,
        extra_order: Literal["after", "before"] = "after",
    ) -> None:
        super().__init__()
        if hasattr(extra, "check_causal"):
            raise TypeError(
                f"A block returns one routing, so its extra feed-forward must be dense: got {type(extra).__name__}. "
                "Put it into a layer of its own."
            )
        branches = 2 + (cross_attention is not None) + (extra is not None)
        if len(norms) != branches:
            raise ValueError(f"Block needs one norm for each of its {branches} branches: got {len(norms)}.")
        self.dropout = dropout
        self.self_attention_norm, self.self_attention = norms[0], self_attention
        if cross_attention is not None:
            self.cross_attention_norm = norms[1]
        self.cross_attention = cross_attention
        feed_norms = norms[branches - 1 :] if extra is None else norms[branches - 2 :]
        if extra is not None and extra_order == "before":
            feed_norms = feed_norms[::-1]
        self.feed_forward_norm, self.feed_forward = feed_norms[0], feed_forward
        if extra is not None:
            self.extra_norm = feed_norms[1]
        self.extra, self.extra_order = extra, extra_order

    @property
    def is_routed(self) -> bool:
        """Whether the feed-forward is told the routing context."""
        return hasattr(self.feed_forward, "check_causal")

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        context: RoutingContext | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> BlockOutput:
        """Compute the block.

        Args:
            x: Float[B, Q, D].
            plan: who sees whom in self-attention.
            context: what routers may know.
            memory: Float[B', S, D] for cross-attention.
            memory_mask: Bool[B', 1, 1, S], True = visible.
            cache: this layer's keys and values of earlier tokens.
        """
        x = self._add(x, self.self_attention(self.self_attention_norm(x), plan, cache))
        if self.cross_attention is not None:
            if memory is None:
                raise ValueError("A block with cross-attention needs a memory: give the encoder's hidden states.")
            x = self._add(x, self.cross_attention(self.cross_attention_norm(x), memory, memory_mask, cache))
        if self.extra is not None and self.extra_order == "before":
            x = self._add(x, self.extra(self.extra_norm(x)))
        update, routing = self._feed(self.feed_forward_norm(x), context)
        x = self._add(x, update)
        if self.extra is not None and self.extra_order == "after":
            x = self._add(x, self.extra(self.extra_norm(x)))
        return BlockOutput(x, routing)

    @property
    def num_branches(self) -> int:
        """Residual branches of the block."""
        return 2 + (self.cross_attention is not None) + (self.extra is not None)

    def _feed(self, x: Tensor, context: RoutingContext | None) -> tuple[Tensor, Routing | None]:
        if self.is_routed:
            output = self.feed_forward(x, context)
            return output.hidden, output.routing
        output = self.feed_forward(x)
        if isinstance(output, MoEOutput):
            raise TypeError(
                f"{type(self.feed_forward).__name__} returned a MoEOutput but has no check_causal method, so it was "
                "not told which tokens are padding. Give it forward(x, context) and check_causal()."
            )
        return output, None

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        return add_dropped(x, update, self.dropout, training=self.training)
