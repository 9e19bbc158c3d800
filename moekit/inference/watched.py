"""Searches that can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moekit.inference.interface import Generation, Search, Start
from moekit.inference.session import Session


@dataclass(frozen=True)
class Watched:
    """A search that asks before each token whether to go on; what it finds is the search's own.

    Args:
        search: finds.
        watch: called before each token; what it raises ends the search.
    """

    search: Search
    watch: Callable[[], None]

    def run(self, session: Session, start: Start) -> Generation:
        """Search all sentences at once."""
        return self.search.run(_WatchedSession(session, self.watch), start)


class _WatchedSession:
    """The session, which calls `watch` before it asks the model."""

    def __init__(self, session: Session, watch: Callable[[], None]) -> None:
        self._session, self._watch = session, watch

    def logits(self, ids: Tensor) -> Tensor:
        self._watch()
        return self._session.logits(ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)
