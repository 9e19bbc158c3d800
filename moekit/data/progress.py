"""Bars for work on text that takes minutes: on a terminal, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moekit.terminal import Terminal

_T = TypeVar("_T")
_EVERY = 10_000


def bar_of(*, shown: bool) -> Progress:
    """A bar with a title, what is done of it, and the time that is left."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return _on_terminal(Progress(*columns, console=Terminal(), transient=True), shown)


@contextmanager
def counting(title: str, *, shown: bool) -> Iterator[Callable[[Iterable[_T]], Iterator[_T]]]:
    """Count sentences whose number nobody knows before the end."""
    columns = (
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.completed:,.0f} sentences", markup=False),
        TimeElapsedColumn(),
    )
    with _on_terminal(Progress(*columns, console=Terminal(), transient=True), shown) as bar:
        task = bar.add_task(title, total=None)

        def counted(items: Iterable[_T]) -> Iterator[_T]:
            for number, item in enumerate(items, start=1):
                if number % _EVERY == 0:
                    bar.update(task, completed=number)
                yield item

        yield counted


def _on_terminal(bar: Progress, shown: bool) -> Progress:
    bar.disable = not (shown and bar.console.is_terminal)
    return bar
