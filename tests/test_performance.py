"""Memory that is kept: counted page faults, in a process of its own, and what a run says of it."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from moekit import performance
from moekit.environment import environment

GLIBC = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"

# The C library's own calls, so that nothing but the module need be imported. Blocks stand beside each other and are
# freed together, as the tensors of a step are.
PROGRAM = """
import ctypes, resource, runpy, sys
module = runpy.run_path(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(32 << 20) for _ in range(2)]
    for block in blocks:
        libc.memset(block, 1, 32 << 20)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def settled():
    return [faults() for _ in range(3)][-1]

first = settled()
answers = [module["keep_memory"](), module["keep_memory"]()]
kept = settled()
answers.append(module["keep_memory"](False))
print(first, kept, settled(), *answers)
"""


@pytest.mark.skipif(not GLIBC, reason="glibc alone")
def test_freed_memory_costs_no_more_page_faults() -> None:
    """Two blocks of 32 MiB have 16,384 pages; once kept, they are there, until keeping is switched off."""
    command = [sys.executable, "-S", "-c", PROGRAM, str(Path(performance.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    first, kept, after, *answers = done.stdout.split()
    assert answers == ["True", "True", "False"]
    assert kept == "0" or int(kept) * 100 < int(first)
    assert int(after) * 2 > int(first) > 0


def test_nothing_happens_with_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("no library may be opened")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    for system, library in (("Darwin", ""), ("Windows", ""), ("Linux", "")):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        monkeypatch.setattr(platform, "libc_ver", lambda library=library: (library, ""))
        assert performance.keep_memory() is False
        assert performance.keep_memory(False) is False


def test_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for keeps in (False, True):
        monkeypatch.setitem(performance._state, "keeps", keeps)
        assert performance.keeps_memory() is keeps
        assert environment()["keeps_freed_memory"] is keeps
