"""Run a function on several processes of this machine, for tests of everything that communicates."""

from __future__ import annotations

import faulthandler
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from lightning.fabric.plugins import ClusterEnvironment

_GRACE = 5.0  # seconds that the other ranks get to finish or fail by themselves after one has failed


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``fn(*args)`` in `world_size` fresh processes joined by gloo; return what each rank returned.

    The first call takes seconds (a server process imports torch once, later ones are forked from it), each a good
    part of one: put many cases into one `fn`. Inside, ask `torch.distributed` for the rank. The processes meet
    through a file, so no port is taken, and have one thread each.

    Args:
        fn: a function at the top of a module (the processes import it).
        world_size: how many processes.
        *args: arguments, the same for every rank; must be picklable.
        timeout: seconds for everything together, start included.

    Returns:
        The returned values in order of rank: tensors, numbers, strings, and lists, tuples and dicts of them.

    Raises:
        RuntimeError: if a rank raised or died; the message holds rank and traceback. The others are stopped.
        TimeoutError: if the time is over; the message says where each rank was.

    Example:
        >>> def sum_of_ranks():
        ...     total = torch.tensor(dist.get_rank())
        ...     dist.all_reduce(total)
        ...     return int(total)
        >>> run_distributed(sum_of_ranks, 2)  # doctest: +SKIP
        [1, 1]
    """
    if world_size < 1:
        raise ValueError(f"run_distributed needs at least one process: got world_size={world_size}.")
    context = _context()
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="moekit-distributed-") as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_rank_main, args=(rank, world_size, name, time.time() + timeout, fn, args), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            failed = _wait(processes, folder, deadline)
            if failed:
                raise RuntimeError(failed)
            return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()


class JoinedProcesses(ClusterEnvironment):
    """Tells a Trainer that its processes run already and have joined a process group, all on one node.

    Inside `run_distributed`: ``Trainer(devices=dist.get_world_size(), plugins=[JoinedProcesses()], ...)``.
    """

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 0  # not needed: they have met

    @staticmethod
    def detect() -> bool:
        """Never chosen by itself."""
        return False

    def world_size(self) -> int:
        """How many processes."""
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        """Nothing to set."""

    def global_rank(self) -> int:
        """Number of this process."""
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        """Nothing to set."""

    local_rank = global_rank

    def node_rank(self) -> int:
        """The only node."""
        return 0


def _context() -> Any:
    """How processes start: forked from a server that has done the imports and nothing else; Windows has no fork."""
    if "forkserver" not in torch.multiprocessing.get_all_start_methods():
        return torch.multiprocessing.get_context("spawn")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__.rpartition(".")[0]])
    return context


def _wait(processes: list[Any], folder: Path, deadline: float) -> str | None:
    """Wait for all ranks; None if all ended well, else what to tell.

    Raises:
        TimeoutError: if the deadline passes first.
    """
    stop, first = deadline, None
    while any(process.exitcode is None for process in processes):
        if first is None:
            first = next((r for r, process in enumerate(processes) if process.exitcode), None)
            if first is not None:
                stop = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > stop:
            break
        time.sleep(0.02)
    if first is None:
        first = next((r for r, process in enumerate(processes) if process.exitcode), None)
    if first is None:
        running = [r for r, process in enumerate(processes) if process.exitcode is None]
        if not running:
            return None
        where = "\n".join(f"rank {r} was at\n{_read(folder / f'{r}.stack') or 'an unknown place'}" for r in running)
        raise TimeoutError(f"ranks {running} of {len(processes)} did not end in time.\n{where}")
    # Other ranks often fail because their peer has gone: the one that failed first tells why.
    written = [r for r in range(len(processes)) if (folder / f"{r}.error").exists()]
    cause = min(written, key=lambda r: (folder / f"{r}.error").stat().st_mtime_ns, default=first)
    died = f"it died with exit code {processes[cause].exitcode}\n{_read(folder / f'{cause}.stack')}"
    story = _read(folder / f"{cause}.error") or died
    others = [r for r in written if r != cause]
    also = f"ranks {others} failed after it" if others else "no other rank failed"
    return f"rank {cause} of {len(processes)} failed ({also}):\n{story}"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _rank_main(rank: int, world_size: int, folder: str, end: float, fn: Callable[..., Any], args: Any) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    room = Path(folder)
    with (room / f"{rank}.stack").open("w", encoding="utf-8") as stack:
        # A signal that ends the process at once, as that of abort(), tells where.
        faulthandler.enable(file=stack)
        # Written a little before the parent gives up, so that a hang tells where it hangs.
        faulthandler.dump_traceback_later(max(end - time.time() - 1.0, 0.1), file=stack)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{room / 'rendezvous'}", rank=rank, world_size=world_size
            )
            torch.manual_seed(0)
            _write(fn(*args), room / f"{rank}.result")
            dist.destroy_process_group()
        except BaseException:
            (room / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
            sys.exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()


def _write(result: Any, path: Path) -> None:
    """Write what a rank returned, as data.

    Raises:
        TypeError: if it is more than data.
    """
    torch.save(result, path)
    try:
        torch.load(path, weights_only=True)
    except Exception as error:
        raise TypeError(
            f"a function of run_distributed returned what cannot be sent back: {result!r}. Return tensors, numbers, "
            "strings, and lists, tuples and dicts of them."
        ) from error
