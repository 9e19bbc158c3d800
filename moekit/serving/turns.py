"""One answer at a time: a short queue between the threads that read requests and the one that runs the model."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from moekit.errors import UserError
from moekit.serving.requests import RefusedError
from moekit.terminal import visible

_POLL = 0.1  # seconds


class GoneError(Exception):
    """Nobody waits for the answer any more."""


class _StoppedError(Exception):
    """An answer that is not needed any more."""


class _Turn:
    def __init__(self, work: Callable[[Callable[[], None]], Any]) -> None:
        self.work = work
        self.done, self.stopped = threading.Event(), threading.Event()
        self.result: Any = None
        self.refused: RefusedError | None = None

    def watch(self) -> None:
        if self.stopped.is_set():
            raise _StoppedError


class Turns:
    """Runs what threads ask for in their order, all of it in the thread that calls `run`.

    The model runs in one thread alone, since every thread that computes with torch keeps a pool of threads of its own.

    Args:
        max_waiting: requests that may wait while one is answered.
        max_seconds: time of an answer, the waiting included.
    """

    def __init__(self, max_waiting: int, max_seconds: float) -> None:
        self.max_waiting, self.max_seconds = max_waiting, max_seconds
        self._queue: queue.Queue[_Turn | None] = queue.Queue()
        self._lock = threading.Lock()
        self._open: list[_Turn] = []
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        with self._lock:
            return max(0, len(self._open) - 1)

    def ask(self, work: Callable[[Callable[[], None]], Any], gone: Callable[[], bool] = lambda: False) -> Any:
        """Wait for a turn, and for what `work` returns.

        Args:
            work: gets a function to call now and then, which ends it when the answer is not needed any more.
            gone: whether the one who asks has left.

        Raises:
            RefusedError: too many wait, it takes too long, the work failed, or the server ends.
            GoneError: the one who asks has left.
        """
        turn, end = _Turn(work), time.monotonic() + self.max_seconds
        with self._lock:
            if self._closed:
                raise _ending()
            if len(self._open) > self.max_waiting:
                raise RefusedError(
                    503, f"too many requests wait: {self.max_waiting} at most. Try again later.", {"Retry-After": "1"}
                )
            self._open.append(turn)
        self._queue.put(turn)
        while not turn.done.wait(min(_POLL, max(0.0, end - time.monotonic()))):
            left, late = gone(), time.monotonic() >= end
            if left or late:
                turn.stopped.set()
                if left:
                    raise GoneError
                raise RefusedError(
                    504, f"the answer took longer than {self.max_seconds:g} seconds. Ask for fewer or shorter lines."
                )
        if turn.refused is not None:
            raise turn.refused
        return turn.result

    def run(self) -> None:
        """Answer until `close`, or an interrupt; a failure of one answer is that answer's alone."""
        while True:
            try:
                turn = self._queue.get(timeout=1.0)  # an endless wait cannot be interrupted on every system
            except queue.Empty:
                continue
            if turn is None:
                return
            self._answer(turn)
            with self._lock:  # not after an interrupt: `close` refuses it then
                self._open.remove(turn)
            turn.done.set()

    def _answer(self, turn: _Turn) -> None:
        try:
            turn.watch()
            turn.result = turn.work(turn.watch)
        except _StoppedError:
            pass
        except UserError as error:
            turn.refused = RefusedError(400, str(error))
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"error: an answer failed: {visible(what)}", file=sys.stderr, flush=True)
            turn.refused = RefusedError(500, "the answer failed; the server's standard error says why.")

    def close(self) -> None:
        """Refuse everything that waits, and all that comes."""
        with self._lock:
            self._closed = True
            for turn in self._open:
                turn.refused = _ending()
                turn.stopped.set()
                turn.done.set()
        self._queue.put(None)


def _ending() -> RefusedError:
    return RefusedError(503, "the server ends.")
