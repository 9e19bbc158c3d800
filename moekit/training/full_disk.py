"""What is said when training ends because nothing more can be written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moekit.atomic import disk_trouble, write_error
from moekit.errors import UserError


@contextmanager
def full_disk_explained(folder: Path, resume_command: str = "") -> Iterator[None]:
    """Where training ends because nothing more can be written to a run's folder, say so in one line, and what is left.

    Args:
        folder: the run's, with its last checkpoint in ``checkpoints/last.ckpt``.
        resume_command: what goes on with the run once there is room.

    Raises:
        UserError: a disk is full, or a file in the folder cannot be written.
    """
    others = threading.excepthook

    def silent(args: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread: what it meets there is raised at the next value that is logged.
        if args.exc_value is None or disk_trouble(args.exc_value, folder) is None:
            others(args)

    threading.excepthook = silent
    try:
        yield
    except Exception as error:
        trouble = disk_trouble(error, folder)
        if trouble is None:
            raise
        said = error if isinstance(error, UserError) else write_error(Path(trouble.filename or folder), trouble)
        last = folder / "checkpoints" / "last.ckpt"
        resume = f" Resume with: {resume_command}" if resume_command else ""
        raise UserError(f"{said} {last} is whole.{resume}" if last.exists() else f"{said}") from error
    finally:
        threading.excepthook = others
