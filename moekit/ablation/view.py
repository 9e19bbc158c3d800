"""What is seen while runs go: a table that is drawn anew on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table as Rows

from moekit.ablation.plan import Job
from moekit.ablation.processes import RunRecord
from moekit.terminal import visible

_STARTING = "starting"


class Progress:
    """Tells of runs as they begin and end, and of those under way: step and minutes left.

    Args:
        console: where it is shown.
        jobs: the runs that are to be made.
        minutes: expected processor minutes of a run by `Job.kin`; `guess` where there are none.
        guess: minutes of a run of which nothing is known.
        at_once: runs at the same time.
    """

    def __init__(
        self, console: Console, jobs: Sequence[Job], minutes: Mapping[str, float], guess: float, at_once: int
    ) -> None:
        self.console, self.at_once = console, at_once
        self.expected = {job.digest: minutes.get(job.kin, guess) for job in jobs}
        self.total, self.ended = len(jobs), 0
        self.began: dict[str, tuple[float, int]] = {}
        self.running: Mapping[str, tuple[Job, int]] = {}
        self.live: Live | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[Progress]:
        """Inside, a terminal has the table at its end."""
        if not self.console.is_terminal or not self.total:
            yield self
            return
        with Live(get_renderable=self._rows, console=self.console, refresh_per_second=2, transient=True) as self.live:
            yield self

    def begin(self, job: Job, going_on: bool) -> None:
        """A run begins, or goes on."""
        self.began[job.digest] = (time.monotonic(), -1)
        if self.live is None:
            self._say(f"{job.label}: {'goes on' if going_on else 'begins'}")

    def step(self, running: Mapping[str, tuple[Job, int]]) -> None:
        """Runs under way, with their last known step."""
        self.running = running
        for digest, (_, step) in running.items():
            _, first = self.began[digest]
            if first < 0 < step:  # the steps before this one were another process's
                self.began[digest] = (time.monotonic(), step)

    def end(self, job: Job, record: RunRecord) -> None:
        """A run has ended."""
        self.ended += 1
        del self.expected[job.digest]
        said = f": {record.said}" if record.said else ""
        left = f"; {len(self.expected)} to go, {spoken_minutes(self.minutes_left())}" if self.expected else ""
        self._say(f"{job.label}: {record.state}, {record.minutes:.1f} processor minutes{said}{left}")

    def minutes_left(self) -> float:
        """Until all runs are done, if each has a processor."""
        under_way = [self._left(job, step) for job, step in list(self.running.values()) if job.digest in self.expected]
        waiting = [minutes for digest, minutes in list(self.expected.items()) if digest not in self.running]
        return (sum(under_way) + sum(waiting)) / max(1, min(self.at_once, len(self.expected)))

    def _left(self, job: Job, step: int) -> float:
        """Minutes, by the steps that this process has seen, else by what runs of its kind take."""
        started, first = self.began[job.digest]
        passed = (time.monotonic() - started) / 60
        if 0 < first < step:
            return passed / (step - first) * (job.steps - step)
        return max(0.0, self.expected[job.digest] - passed)

    def _rows(self) -> Rows:
        rows = Rows(box=None, padding=(0, 2, 0, 0))
        for name, side in (("run", "left"), ("step", "right"), ("minutes left", "right")):
            rows.add_column(name, justify=side)  # type: ignore[arg-type]
        for job, step in list(self.running.values()):
            said = f"{step:,} of {job.steps:,}" if step else _STARTING
            rows.add_row(visible(job.label), said if job.trains else "test", f"{self._left(job, step):.1f}")
        rows.add_row(f"{self.ended} of {self.total} runs", "", f"{self.minutes_left():.0f}", style="bold")
        return rows

    def _say(self, text: str) -> None:
        self.console.print(visible(text), highlight=False, markup=False, soft_wrap=True)


def spoken_minutes(minutes: float) -> str:
    """``about 12 minutes``, ``about 1 minute`` or ``less than 1 minute``."""
    if minutes < 0.5:
        return "less than 1 minute"
    return "about 1 minute" if minutes < 1.5 else f"about {minutes:.0f} minutes"
