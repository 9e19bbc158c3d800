"""How a process keeps the memory of tensors that it has freed, so that the next ones cost no page faults."""

from __future__ import annotations

import ctypes
import platform

# Names of mallopt's settings, as malloc.h has them, with glibc's own values. Those are only where it begins: it moves
# the first two by itself until they are set.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_DEFAULTS = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 * 1024, _TOP_PAD: 128 * 1024}
# No block gets pages of its own, which freeing would give back (a threshold of sizes would not do: mallopt takes a C
# int, below 2 GiB); the end of the heap is never cut off (-1: the largest threshold); and it grows by 64 MiB at least.
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}

_state = {"keeps": False}


def keep_memory(on: bool = True) -> bool:
    """Keep memory that tensors have freed in this process, where the C library is glibc.

    glibc gives the memory of every large tensor back to the system when it is freed, and the system hands out pages
    that it first has to find and to zero, one page fault for each 4 KiB. In a training step of a sparse layer on a CPU
    that takes as long as a third of its products. After this call freed memory serves the tensors that follow. The
    process holds on to the most that it ever needed, and to what is lost between tensors of different sizes.

    It is for the whole process, and for processes forked from it; it may be called at any time and any number of times,
    best before the first large tensor. moekit's programs call it when they start, and training by
    ``train.keep_memory``; importing moekit does not. Memory of a GPU is not concerned: torch keeps that itself.

    Args:
        on: False = give freed memory back, by glibc's first settings.

    Returns:
        Whether freed memory is kept from now on. False with every other C library, where nothing is changed.

    Source: mallopt(3).
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a program that is linked with another library
        return False
    settings = _KEEPING if on else _DEFAULTS
    taken = [bool(mallopt(ctypes.c_int(name), ctypes.c_int(value))) for name, value in settings.items()]
    _state["keeps"] = on and all(taken)
    return _state["keeps"]


def keeps_memory() -> bool:
    """Whether this process keeps freed memory, as far as `keep_memory` was called in it or before it was forked."""
    return _state["keeps"]


def keep_memory_in_worker(worker: int) -> None:
    """`keep_memory` in a worker of a DataLoader that is started anew and inherits nothing: its ``worker_init_fn``."""
    keep_memory()
