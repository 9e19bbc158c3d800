"""Memory that is kept: counted page faults, in a process of its own, and what a run says of it."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
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


@pytest.mark.skipif(not GLIBC, reason="glibc alone")
def test_switching_off_what_was_never_on_changes_nothing() -> None:
    """glibc itself keeps a block below 32 MiB, since its thresholds rise with what is freed until they are set."""
    program = PROGRAM.split("first =")[0].replace("32 << 20", "8 << 20").replace("range(2)", "range(1)")
    program += 'print(module["keep_memory"](False), module["keeps_memory"](), settled())'
    command = [sys.executable, "-S", "-c", program, str(Path(performance.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    *answers, faults = done.stdout.split()
    assert answers == ["False", "False"]
    assert int(faults) < 205  # a tenth of the 2,048 pages of a block


# Gives what is asked for, one block behind the other, and takes nothing back.
ALLOCATOR = """
#include <errno.h>
#include <stddef.h>
#include <string.h>
static char room[1 << 29];
static size_t used;
void *memalign(size_t to, size_t size) {
    size_t start = (__atomic_fetch_add(&used, size + to + 32, __ATOMIC_SEQ_CST) + 16 + to - 1) / to * to;
    *(size_t *)(room + start - 16) = size;
    return room + start;
}
void *malloc(size_t size) { return memalign(16, size); }
void *aligned_alloc(size_t to, size_t size) { return memalign(to < 16 ? 16 : to, size); }
int posix_memalign(void **out, size_t to, size_t size) { *out = aligned_alloc(to, size); return 0; }
void *calloc(size_t n, size_t size) { return memset(malloc(n * size), 0, n * size); }
void free(void *block) {}
void *realloc(void *block, size_t size) {
    void *out = malloc(size);
    size_t old = block ? *(size_t *)((char *)block - 16) : 0;
    return block ? memcpy(out, block, old < size ? old : size) : out;
}
"""


@pytest.mark.skipif(not GLIBC or shutil.which("cc") is None, reason="glibc and a C compiler")
def test_memory_that_another_allocator_holds_is_not_said_to_be_kept(tmp_path: Path) -> None:
    """jemalloc and tcmalloc are loaded so; glibc's settings are taken then, and move nothing."""
    source, library = tmp_path / "allocator.c", tmp_path / "allocator.so"
    source.write_text(ALLOCATOR, encoding="utf-8")
    command = ["cc", "-shared", "-fPIC", "-fno-builtin", "-O1", "-w", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    program = "import runpy, sys; module = runpy.run_path(sys.argv[1]); print(module['keep_memory']())"
    for preload, said in ((str(library), "False"), ("", "True")):
        done = subprocess.run(
            [sys.executable, "-S", "-c", program, str(Path(performance.__file__))],
            env={**os.environ, "LD_PRELOAD": preload}, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.strip() == said


def test_nothing_happens_with_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("no library may be opened")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    for system, library in (("Darwin", ""), ("Windows", ""), ("Linux", "")):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        monkeypatch.setattr(platform, "libc_ver", lambda library=library: (library, ""))
        for changed in (False, True):
            monkeypatch.setitem(performance._state, "changed", changed)
            assert performance.keep_memory() is False
            assert performance.keep_memory(False) is False


def test_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for keeps in (False, True):
        monkeypatch.setitem(performance._state, "keeps", keeps)
        assert performance.keeps_memory() is keeps
        assert environment()["keeps_freed_memory"] is keeps
