"""A recurrent language model around one feed-forward: LSTM, Mixture of Experts, LSTM.

Answers heads, searches and statistics as `moekit.transformer.DecoderOnly` does.
"""

from __future__ import annotations

from torch import Tensor, nn

from moekit.component import Component
from moekit.functional.dropout import add_dropped, dropout
from moekit.routing import Routing, RoutingContext
from moekit.transformer.cache import DecoderCache
from moekit.transformer.context import routing_context
from moekit.transformer.init import init_weights
from moekit.transformer.models import TokenModel
from moekit.transformer.output import BlockOutput, DecoderOutput, StackOutput
from moekit.transformer.padding import check_right_padded

State = tuple[Tensor, Tensor]
"""Output and cell of an LSTM, Float[1, R, D] and Float[1, R, units]."""


class RecurrentCache(DecoderCache):
    """What LSTMs remember, and what routing needs to know of the past. For inference: it is changed in place.

    Attributes:
        states: state of every LSTM that has seen something, by the number of its layer.
    """

    def __init__(self) -> None:
        super().__init__(0)  # no layer holds keys and values
        self.states: dict[int, State] = {}

    def reorder(self, rows: Tensor) -> None:  # noqa: D102
        super().reorder(rows)
        for number, (output, cell) in self.states.items():
            self.states[number] = (output.index_select(1, rows), cell.index_select(1, rows))


class RecurrentLayer(Component):
    """x + dropout(LSTM(x)).

    Args:
        dim: D of input and output.
        units: cells; more than D are projected to D (an LSTM with a recurrent projection).
        dropout: probability on the output.

    Raises:
        ValueError: if there are fewer cells than D.

    Source: arXiv:1701.06538 appendix C.1; projection: arXiv:1402.1128. Differs: two bias vectors, as torch has them.
    """

    is_routed = False

    def __init__(self, dim: int, units: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if units < dim:
            raise ValueError(f"RecurrentLayer needs at least as many units as dim: got units={units} and dim={dim}.")
        self.dropout = dropout
        self.lstm = nn.LSTM(dim, units, batch_first=True, proj_size=dim if units > dim else 0)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Float[B, S, D] and the state after the last token, from the state before the first (None = zeros)."""
        y, after = self.lstm(x, state)
        return add_dropped(x, y, self.dropout, training=self.training), after


class SigmoidFeedForward(Component):
    """x + dropout(sigmoid(f(x))), f a feed-forward, sparse or dense.

    Args:
        feed_forward: a `MoELayer` or the like, or a module from Float[..., D] to the same shape.
        dropout: probability on the output.

    Source: arXiv:1701.06538 appendix C.1 (a sigmoid on the output of the layer of experts, then dropout, then the
        residual).
    """

    def __init__(self, feed_forward: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.feed_forward, self.dropout = feed_forward, dropout

    @property
    def is_routed(self) -> bool:
        """Whether the feed-forward is told the routing context."""
        return hasattr(self.feed_forward, "check_causal")

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> BlockOutput:
        """Compute Float[B, S, D]; context fields are ``[B * S]``."""
        y, routing = self.feed_forward(x, context) if self.is_routed else (self.feed_forward(x), None)
        return BlockOutput(add_dropped(x, y.sigmoid(), self.dropout, training=self.training), routing)


class RecurrentStack(Component):
    """LSTMs around one feed-forward.

    Args:
        dim: D.
        units: cells of each LSTM.
        feed_forward: what stands between them, in the middle; None = nothing.
        lstms: number of LSTMs.
        dropout: probability on the output of every layer, and on the embeddings.
        pad_id: stands for "the token before the first" in routing contexts.

    Raises:
        ValueError: if there is no LSTM, or the feed-forward may look at later tokens.
    """

    def __init__(
        self,
        dim: int,
        units: int,
        feed_forward: nn.Module | None,
        *,
        lstms: int = 2,
        dropout: float = 0.0,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        if lstms < 1:
            raise ValueError(f"RecurrentStack needs at least one LSTM: got lstms={lstms}.")
        self.dropout, self.pad_id = dropout, pad_id
        layers: list[nn.Module] = [RecurrentLayer(dim, units, dropout=dropout) for _ in range(lstms)]
        if feed_forward is not None:
            between = SigmoidFeedForward(feed_forward, dropout=dropout)
            if between.is_routed:
                feed_forward.check_causal()  # type: ignore[operator]
            layers.insert((lstms + 1) // 2, between)
        self.layers = nn.ModuleList(layers)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The layers, first to last."""
        return tuple(self.layers)

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Numbers of the sparse layers."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_routed)

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        mask: Tensor | None = None,
        language: Tensor | None = None,
        *,
        cache: RecurrentCache | None = None,
    ) -> StackOutput:
        """Run the layers; arguments as in `moekit.transformer.Stack.forward`, padding on the right only."""
        context = None
        if self.routed_layers:
            context = routing_context(ids, mask, language, pad_id=self.pad_id, cache=cache)
        check_right_padded(mask, cached=cache is not None)
        x = dropout(x, self.dropout, training=self.training)
        routings: list[Routing] = []
        for number, layer in enumerate(self.layers):
            if isinstance(layer, RecurrentLayer):
                x, state = layer(x, None if cache is None else cache.states.get(number))
                if cache is not None:
                    cache.states[number] = state
            else:
                output = layer(x, context)
                x = output.hidden
                routings += [] if output.routing is None else [output.routing]
        if cache is not None:
            cache.advance(ids)
        return StackOutput(x, tuple(routings))


class RecurrentLM(TokenModel):
    """A language model of an embedding, LSTMs around a feed-forward, and a softmax, with residuals.

    Args:
        vocab_size: V.
        dim: D, of embeddings and of every layer's input and output.
        feed_forward: a `MoELayer`, or a dense module from Float[..., D] to the same shape; None = LSTMs alone.
        lstms: number of LSTMs, half of them below the feed-forward.
        units: cells of each LSTM; None = D, more are projected to D.
        dropout: probability on the output of every layer but the softmax.
        tied: one table embeds tokens and makes the logits; else two.
        pad_id: that of `RecurrentStack`.

    Example:
        >>> import torch
        >>> from moekit.transformer import MLP
        >>> model = RecurrentLM(100, 16, MLP(16, 64))
        >>> model.logits(model.decode(torch.randint(3, 100, (2, 7))).hidden).shape
        torch.Size([2, 7, 100])

    Source: arXiv:1701.06538 appendix C.1. Differs: embeddings as in `moekit.transformer.TokenEmbedding`; the softmax
        is computed over the whole vocabulary, not over a sample of it.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        feed_forward: nn.Module | None,
        *,
        lstms: int = 2,
        units: int | None = None,
        dropout: float = 0.0,
        tied: bool = False,
        pad_id: int = 0,
    ) -> None:
        super().__init__(vocab_size, dim, tied=tied, pad_id=pad_id)
        self.decoder = RecurrentStack(dim, units or dim, feed_forward, lstms=lstms, dropout=dropout, pad_id=pad_id)
        init_weights(self)

    def new_cache(self) -> RecurrentCache:
        """An empty cache for `decode`."""
        return RecurrentCache()

    def decode(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        language: Tensor | None = None,
        cache: RecurrentCache | None = None,
    ) -> DecoderOutput:
        """As `moekit.transformer.DecoderOnly.decode`."""
        output = self.decoder(self.embedding(ids), ids, mask, language, cache=cache)
        return DecoderOutput(output.hidden, output.routings, cache)
