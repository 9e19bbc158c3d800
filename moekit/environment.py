"""What a run ran on: versions, machine, threads, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit import shell
from moekit.performance import keeps_memory

_PACKAGES = ("torch", "lightning", "torchmetrics", "sacrebleu", "sentencepiece", "triton", "transformers", "peft")
"""Those that results can depend on; those that are not installed are left out."""


def environment() -> dict[str, Any]:
    """What the run ran on: versions, machine, threads, commit, command; neither user nor host name."""
    home = os.path.expanduser("~")
    command = ["python", *sys.orig_argv[1:]]
    if Path("".join(command[1:2])).stem == shell.NAME:
        command = [shell.NAME, *command[2:]]  # the console script, by whatever path
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": [part.replace(home, "~") if len(home) > 1 else part for part in command],
        "moekit": moekit.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpus_usable": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "keeps_freed_memory": keeps_memory(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "accelerator": accelerator,
    }


def usable_cores() -> int:
    """The cores that this process may run on, which a scheduler or a container can make fewer than the machine has."""
    # Python 3.13 counts them by itself, as process_cpu_count; macOS and Windows cannot say.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """The commit of moekit's own checkout and whether files were changed since; None where it is installed."""
    package = Path(moekit.__file__).parent

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return result.stdout.strip()

    try:
        # In somebody else's repository (a virtual environment inside one) moekit's files are not tracked.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"id": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
