"""Everything imports where the system lacks what only Unix has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Modules and functions of the standard library that Windows does not have.
MODULES = ("fcntl", "resource", "grp", "pwd", "termios", "syslog", "curses", "readline")
FUNCTIONS = ("sched_getaffinity", "fork", "getuid", "geteuid", "getpgid", "killpg", "setsid", "statvfs", "uname")

PROGRAM = f"""
# What others import is their affair.
import importlib, os, pkgutil, sys
import filelock, lightning, matplotlib.figure, sacrebleu, torchmetrics, transformers.trainer_callback
import torch, torch._dynamo, torch.distributed.checkpoint
for name in {MODULES!r}:
    sys.modules[name] = None  # an import of it fails
for name in {FUNCTIONS!r}:
    delattr(os, name)
import moekit, moekit_binding
found = [m.name for m in pkgutil.walk_packages(moekit.__path__, "moekit.") if not m.name.endswith("__main__")]
for name in found:
    importlib.import_module(name)
print(len(found))
"""


def test_everything_imports_without_what_only_unix_has(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=None, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 250
