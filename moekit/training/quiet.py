"""Training without Lightning's own messages."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's messages, which say nothing that the run's own lines do not: but for one.

    That tells which process has ended, before all others of the node are killed.
    """
    names = {"lightning.pytorch": logging.ERROR, "lightning.fabric": logging.ERROR, _OBSERVER: logging.INFO}
    loggers = {logging.getLogger(name): level for name, level in names.items()}
    levels = [logger.level for logger in loggers]
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            warnings.filterwarnings("ignore", module="torch.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
