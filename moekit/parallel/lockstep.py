"""Lockstep: ranks tell each other what they are about to do, before they would wait for each other in vain.

Collectives meet by their order alone. If one rank skips a layer, or has a batch less, its next collective meets another
one of the others: they wait until the timeout, or, where sizes agree, get each other's weights. So every rank first
sends what it is about to do to the next one of a ring, by way of host memory, and compares it with what the one before
it sends: two ranks that differ cannot stand in a ring without two neighbours that differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.utils.hooks import RemovableHandle

from moekit.errors import UserError
from moekit.parallel.mesh import host_group

_ADVICE = (
    "All ranks must take the same steps through the same layers: give them equally many batches (drop_last, "
    "limit_train_batches), and let none skip a layer, a loss or a call of the Strategy by itself."
)


class OutOfStepError(RuntimeError):
    """Ranks are about to do different things, or one has stopped."""


@dataclass(frozen=True)
class Position:
    """Where in its work a rank is.

    Attributes:
        stage: "train", "validate", ...
        epoch: The epoch, from 0.
        batch: The batch of the epoch or of the evaluation, from 0; -1 = none.
        step: The number of optimizer steps taken.
    """

    stage: str = "setup"
    epoch: int = 0
    batch: int = -1
    step: int = 0

    def __str__(self) -> str:
        where = f"batch {self.batch} of epoch {self.epoch}" if self.batch >= 0 else f"epoch {self.epoch}"
        return f"{self.stage}, {where}, step {self.step}"


@dataclass
class Lockstep:
    """The ring of all ranks, and where this one is. All ranks must make it, and with the same points.

    Args:
        points: The names of everything that ranks can be about to do, the same on all ranks.
        stages: The stages that a `Position` may name.
        timeout: The time that a rank waits for its neighbour; None = torch's default.
        each: Whether ranks meet at every module that was given to `watch`. If not, they compare which modules they have
            passed when they meet next, which costs a message less for each.
    """

    points: Sequence[str]
    stages: Sequence[str]
    timeout: timedelta | None = None
    each: bool = True
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout = self.timeout or default_pg_timeout
        self._numbers = {point: n for n, point in enumerate(self.points)}
        self._group = host_group("lockstep", self.timeout) if self.size > 1 else None
        self._everybody = tuple(range(self.size))
        self._inside: tuple[int, ...] = ()
        self._passed = 0
        self._heard: dict[int, str] = {}

    def meet(self, point: str, ring: Sequence[int] | None = None) -> None:
        """Compare with the neighbours what this rank does next.

        Args:
            point: The name of what comes next, one of `points`.
            ring: The ranks that must do the same, in order; None = all.

        Raises:
            OutOfStepError: Naming ranks and where they are, if the rank before this one does something else, or says
                nothing until the timeout.
        """
        ring = self._everybody if ring is None else ring
        if len(ring) < 2:
            return
        here = ring.index(self.rank)
        before, after = ring[here - 1], ring[(here + 1) % len(ring)]
        mine, theirs = self._pack(point), torch.empty(6, dtype=torch.int64)
        waits_for = before
        try:
            arriving = dist.irecv(theirs, src=before, group=self._group)
            leaving = dist.isend(mine, dst=after, group=self._group)
            assert arriving is not None
            assert leaving is not None
            arriving.wait()
            waits_for = after  # who takes what is sent
            leaving.wait()
        except RuntimeError as error:
            last = f" It was last about to start {self._heard[before]}." if before in self._heard else ""
            raise OutOfStepError(
                f"rank {self.rank} is about to start {self._tell(mine)}, and waits for rank {waits_for}, which has "
                f"ended or said nothing for {self.timeout}.{last if waits_for == before else ''} {_ADVICE}"
            ) from error
        self._heard[before] = self._tell(theirs)
        if torch.equal(mine, theirs):
            return
        if torch.equal(mine[:-1], theirs[:-1]):
            raise OutOfStepError(
                f"rank {before} and rank {self.rank} have passed other layers, or in another order, before they were "
                f'about to start {self._tell(mine)}. lockstep="module" says which. {_ADVICE}'
            )
        raise OutOfStepError(
            f"rank {before} is about to start {self._tell(theirs)}, where rank {self.rank} is about to start "
            f"{self._tell(mine)}. {_ADVICE}"
        )

    @contextmanager
    def step(self, ring: Sequence[int] | None = None) -> Iterator[None]:
        """Inside, ranks of `ring` (None = all) meet at, or take note of, modules that were given to `watch`."""
        self._inside = self._everybody if ring is None else tuple(ring)
        self._passed = 0
        try:
            yield
        finally:
            self._inside = ()

    def watch(self, module: nn.Module, point: str) -> RemovableHandle:
        """Look at every forward of `module`, before it. To be called after `fully_shard` has wrapped it."""
        return module.register_forward_pre_hook(_Watch(self, point), prepend=True)

    def pass_by(self, point: str) -> None:
        """Say that a module comes next, at once or when ranks meet."""
        if self.each:
            self.meet(point, self._inside)
        else:
            self._passed = (31 * self._passed + self._numbers[point] + 1) % 2**48

    def forget(self) -> None:
        """Take no account of what was passed: other ranks may have had other batches."""
        self._passed = 0

    def require_equal(self, number: float, what: str, advice: str) -> None:
        """Refuse numbers that differ between ranks.

        Raises:
            UserError: If they differ, on all ranks.
        """
        if self._group is None:
            return
        numbers = [number] * self.size
        dist.all_gather_object(numbers, number, group=self._group)
        least, most = min(numbers), max(numbers)
        if least != most:
            raise UserError(
                f"all ranks must have equally many {what}: rank {numbers.index(least)} has {least:.0f}, rank "
                f"{numbers.index(most)} has {most:.0f}. {advice.format(least=f'{least:.0f}')}"
            )

    def _pack(self, point: str) -> Tensor:
        position = self.position
        stage = self.stages.index(position.stage)
        return torch.tensor([self._numbers[point], stage, position.epoch, position.batch, position.step, self._passed])

    def _tell(self, packed: Tensor) -> str:
        point, stage, epoch, batch, step, _ = packed.tolist()
        return f"{self.points[point]} ({Position(self.stages[stage], epoch, batch, step)})"


class _Watch:
    """A hook that copies of the module do not have."""

    def __init__(self, lockstep: Lockstep, point: str) -> None:
        self.lockstep: Lockstep | None = lockstep
        self.point = point

    @torch._dynamo.disable
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.lockstep is not None and self.lockstep._inside:
            self.lockstep.pass_by(self.point)

    def __getstate__(self) -> dict[str, Any]:
        return {"lockstep": None, "point": self.point}
