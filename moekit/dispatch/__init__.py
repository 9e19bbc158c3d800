"""Dispatch: bring tokens to their experts and results back.

A dispatcher turns a `Routing` into rows grouped by expert and, after the experts, sums the weighted results for each
token. Experts are all in this process, or, with an `Exchange`, spread over the ranks of a process group.

- `PackedDispatcher`: exactly the rows that are kept, one after the other. No padding, any load; the number of rows
  depends on data.
- `PaddedDispatcher`: C slots for each expert. Static shapes (`torch.compile(fullgraph=True)`, equal all-to-all
  splits), needs a capacity.
"""

from moekit.dispatch.base import Dispatched, Dispatcher
from moekit.dispatch.exchange import AllToAll, Exchange, Route, TwoLevelAllToAll
from moekit.dispatch.packed import PackedDispatcher
from moekit.dispatch.padded import PaddedDispatcher

__all__ = [
    "AllToAll",
    "Dispatched",
    "Dispatcher",
    "Exchange",
    "PackedDispatcher",
    "PaddedDispatcher",
    "Route",
    "TwoLevelAllToAll",
]
