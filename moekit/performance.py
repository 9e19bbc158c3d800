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
_PROBE = 1 << 20  # bytes of the block that shows whose memory it is

_state = {"keeps": False, "changed": False}


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
        on: False = give freed memory back, by glibc's first settings. Where nothing was changed before, nothing is:
            once set, glibc's thresholds no longer move, and a process would keep less than it does by itself.

    Returns:
        Whether freed memory is kept from now on. False with every other C library, and where another allocator was
        loaded before glibc's (jemalloc, tcmalloc); nothing is changed there.

    Source: mallopt(3), mallinfo(3).
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc" or not (on or _state["changed"]):
        return False
    try:
        library = ctypes.CDLL(None)
        if not _serves(library):
            return False
        settings = _KEEPING if on else _DEFAULTS
        taken = [bool(library.mallopt(ctypes.c_int(name), ctypes.c_int(value))) for name, value in settings.items()]
    except (OSError, AttributeError):  # a program that is linked with another library
        return False
    _state.update(keeps=on and all(taken), changed=True)
    return _state["keeps"]


class _Usage(ctypes.Structure):
    """What glibc's mallinfo2 returns: ten numbers, of which the two of memory in use have names here."""

    _fields_ = (
        ("other", ctypes.c_size_t * 4),
        ("mapped", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 2),
        ("on_heap", ctypes.c_size_t),
        ("rest", ctypes.c_size_t * 2),
    )


def _serves(library: ctypes.CDLL) -> bool:
    """Whether the process's memory is glibc's: a block shows in glibc's own count. Without a count it is believed."""
    if not hasattr(library, "mallinfo2"):  # before glibc 2.33
        return True
    library.mallinfo2.restype = _Usage
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]

    def in_use() -> int:
        usage = library.mallinfo2()
        return int(usage.mapped + usage.on_heap)

    def shows() -> bool:
        before = in_use()
        block = library.malloc(_PROBE)
        after = in_use()
        library.free(block)
        return 2 * (after - before) > _PROBE

    return any(shows() for _ in range(3))  # another thread may give as much back meanwhile


def keeps_memory() -> bool:
    """Whether this process keeps freed memory, as far as `keep_memory` was called in it or before it was forked."""
    return _state["keeps"]


def keep_memory_in_worker(worker: int) -> None:
    """`keep_memory` in a worker of a DataLoader that is started anew and inherits nothing: its ``worker_init_fn``."""
    keep_memory()
