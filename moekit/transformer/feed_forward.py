"""Dense feed-forwards, and the choice of which layers get which feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from moekit.functional.activation import Activation, activation_function
from moekit.functional.dropout import activation_dropout, dropout
from moekit.transformer.projection import FusedLinear, projection

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class SparseDense:
    """Two feed-forwards in one layer, made by a factory: x + sparse(norm(x)), and then + dense(norm'(...)).

    Each is a residual branch of its own, with a norm and a dropout of its own, which the stack makes.

    Attributes:
        sparse: a `MoELayer` or the like.
        dense: the extra feed-forward, for example `GLU`.
        order: "after" = the dense one comes after the sparse one, "before" = before it.

    Raises:
        ValueError: if `order` is neither.

    Source: arXiv:2202.08906 appendix C ("sparse-dense" blocks: +0.014 in quality, before or after alike); own norm and
        dropout, after the sparse layer, as in the authors' code.
    """

    sparse: nn.Module
    dense: nn.Module
    order: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        if self.order not in ("after", "before"):
            raise ValueError(f'SparseDense.order must be "after" or "before": got {self.order!r}.')


class FeedForwardFactory(Protocol):
    """Makes the feed-forward of one layer; None = the stack's default dense one."""

    def __call__(self, layer: int, side: Side, /) -> nn.Module | SparseDense | None:
        """Make the feed-forward of layer number `layer` (0 = first) of the encoder or the decoder."""


class _FeedForward(nn.Module):
    """Two layers, the first of `maps` linear maps, and dropout between them."""

    maps: ClassVar[int]
    w_in: nn.Linear | FusedLinear

    def __init__(
        self, dim: int, hidden_dim: int, *, activation: Activation = "relu", dropout: float = 0.0, bias: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.activation, self.dropout = dim, activation, dropout
        self._act = activation_function(activation)
        self.w_in = projection(self.maps, dim, hidden_dim, bias=bias)
        self.w_out = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute Float[..., D]."""
        return self.w_out(self._hidden(self.w_in(x)))

    def _hidden(self, mapped: Tensor) -> Tensor:
        """What activation and dropout leave of the linear maps' results."""
        return activation_dropout(mapped, self.activation, self.dropout, training=self.training)


class MLP(_FeedForward):
    """Two-layer feed-forward, y = activation(x W_in) W_out.

    Args:
        dim: D.
        hidden_dim: F.
        activation: "relu" (Transformer, T5), "gelu" or "silu".
        dropout: probability on the hidden activations.
        bias: whether both layers have biases.

    Source: arXiv:1706.03762 eq. 2.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "w_in.weight": ("mlp", "embed"),
        "w_in.bias": ("mlp",),
        "w_out.weight": ("embed", "mlp"),
        "w_out.bias": ("embed",),
    }

    maps = 1
    w_in: nn.Linear


class GLU(_FeedForward):
    """Gated feed-forward, y = (activation(x W_gate) * x W_up) W_out; gate and up come from one product.

    Its arguments are those of `MLP`. With two thirds of an `MLP`'s `hidden_dim` it costs the same. The activation makes
    it a GEGLU ("gelu"), SwiGLU ("silu") or ReGLU ("relu").

    Source: arXiv:2002.05202 eq. 6.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "w_in.weight": ("part", "mlp", "embed"),
        "w_in.bias": ("part", "mlp"),
        "w_out.weight": ("embed", "mlp"),
        "w_out.bias": ("embed",),
    }

    maps = 2
    w_in: FusedLinear

    def __init__(
        self, dim: int, hidden_dim: int, *, activation: Activation = "gelu", dropout: float = 0.0, bias: bool = False
    ) -> None:
        super().__init__(dim, hidden_dim, activation=activation, dropout=dropout, bias=bias)

    def _hidden(self, mapped: Tensor) -> Tensor:
        gate, up = mapped.unbind(-2)
        return dropout(self._act(gate) * up, self.dropout, training=self.training)


def at_layers(
    layers: Collection[int] | Mapping[Side, Collection[int]],
    sparse: FeedForwardFactory,
    dense: FeedForwardFactory | None = None,
) -> FeedForwardFactory:
    """`sparse` at the chosen layers, `dense` (default: the stack's own) at the others.

    Args:
        layers: numbers from 0, for both sides, or by side: ``{"encoder": {1, 3}}`` (a side left out is dense).
        sparse: makes the chosen layers, for example ``lambda layer, side: MoELayer(...)``.
        dense: makes the others.
    """
    by_side = layers if isinstance(layers, Mapping) else {"encoder": layers, "decoder": layers}
    return _chosen(lambda layer, side: layer in by_side.get(side, ()), sparse, dense)


def every_other(
    sparse: FeedForwardFactory, dense: FeedForwardFactory | None = None, *, start: int = 1, every: int = 2
) -> FeedForwardFactory:
    """`sparse` at layers start, start + every, ...; `dense` (default: the stack's own) at the others.

    Source: GShard and Switch put experts in every other layer, the second first (arXiv:2006.16668 section 2.2,
    arXiv:2101.03961 section 2.5); ``start=3, every=4`` is ST-MoE's (arXiv:2202.08906 table 11).

    Raises:
        ValueError: if `every` is less than 1 or `start` negative.
    """
    if every < 1 or start < 0:
        raise ValueError(f"every_other needs every >= 1 and start >= 0: got {every} and {start}.")

    return _chosen(lambda layer, side: layer >= start and (layer - start) % every == 0, sparse, dense)


def pyramid(
    num_experts: Sequence[int] | Mapping[Side, Sequence[int]],
    sparse: Callable[[int, Side, int], nn.Module | SparseDense | None],
    dense: FeedForwardFactory | None = None,
) -> FeedForwardFactory:
    """Experts by layer: as many as a list says, 0 = dense (default: the stack's own).

    PR-MoE-32/64 of DeepSpeed-MoE has 24 layers, every other one sparse, the last two of them with twice the experts:

        pyramid([0, 32] * 10 + [0, 64] * 2, lambda layer, side, n: MoELayer(
            routers.switch(dim, n), experts.GroupedMLP(n, dim, hidden), shared=MLP(dim, hidden)))

    Args:
        num_experts: one number per layer, for both sides or by side (a side left out is dense).
        sparse: makes a layer of so many experts: ``sparse(layer, side, num_experts)``.
        dense: makes the others.

    Raises:
        ValueError: if a number is negative; in the call, if the list ends before the layers do.

    Source: arXiv:2201.05596 section 4.1 (pyramid: more experts in the last layers).
    """
    lists = dict(num_experts) if isinstance(num_experts, Mapping) else {"encoder": num_experts, "decoder": num_experts}
    for side, counts in lists.items():
        if any(n < 0 for n in counts):
            raise ValueError(
                f"pyramid needs numbers of experts of at least 0 (0 = dense): got {list(counts)} ({side})."
            )

    def at(layer: int, side: Side) -> int:
        counts = lists.get(side)
        if counts is None:
            return 0
        if layer >= len(counts):
            raise ValueError(
                f"pyramid needs one number of experts per layer: got {len(counts)} numbers, and the {side} has a layer "
                f"number {layer}. Give the list a number for every layer, 0 where it is dense."
            )
        return counts[layer]

    return _chosen(at, lambda layer, side: sparse(layer, side, at(layer, side)), dense)


def _chosen(
    sparse_at: Callable[[int, Side], object], sparse: FeedForwardFactory, dense: FeedForwardFactory | None
) -> FeedForwardFactory:
    """`sparse` where `sparse_at` says something true, elsewhere `dense`, or None where there is none."""

    def make(layer: int, side: Side, /) -> nn.Module | SparseDense | None:
        factory = sparse if sparse_at(layer, side) else dense
        return None if factory is None else factory(layer, side)

    return make
