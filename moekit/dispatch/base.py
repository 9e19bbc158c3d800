"""What a dispatcher is, and what it hands to experts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor

from moekit.dispatch.exchange import Exchange
from moekit.routing import Routing


@dataclass(frozen=True)
class Dispatched:
    """Rows on their way to the experts.

    Attributes:
        rows: Float[R, D] sorted by expert (packed) or Float[E, C, D] (padded). Across ranks E counts the experts of
            this rank, and the rows are those of all ranks of the group.
        counts: Int64[E] rows of each expert (packed), or None (padded).
        handle: what `combine` needs; opaque to everyone else.
    """

    rows: Tensor
    counts: Tensor | None
    handle: Any


class Dispatcher(Protocol):
    """Groups rows by expert and brings results back. Not a module: it has no parameters."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Group the rows of ``x`` Float[T, D] by expert."""
        ...

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        """Float[T, D]: the weighted sum of each token's results, in float32; zeros where nothing was kept."""
        ...

    def across(self, exchange: Exchange | None) -> Self:
        """A dispatcher of this kind for experts that are spread over the ranks of `exchange`; None = all are here."""
        ...


class ExchangeDispatcher(ABC):
    """What the dispatchers of this room have in common: the exchange, and that rows travel while others compute.

    Args:
        exchange: brings rows to the ranks that hold their experts; None = all experts are here.
    """

    def __init__(self, exchange: Exchange | None = None) -> None:
        self.exchange = exchange

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        return self.dispatch_async(x, routing)()

    @abstractmethod
    def dispatch_async(self, x: Tensor, routing: Routing) -> Callable[[], Dispatched]:
        """Send the rows of ``x`` Float[T, D] on their way; what is returned waits for them, and is to be called once.

        What is computed between the two calls overlaps with the sending, and its backward with that of the gradients:
        see `moekit.dispatch.exchange`.
        """

    def across(self, exchange: Exchange | None) -> Self:
        """See `Dispatcher.across`."""
        other = copy.copy(self)
        other.exchange = exchange
        return other
