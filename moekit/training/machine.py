"""What this machine has for a run: its GPU, a place for each process, and the start of processes on other machines."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.fabric.plugins import environments

from moekit.errors import UserError

_PROCESSES_A_CORE = 8
"""More processes than that on a CPU are a mistake."""
_LAUNCHERS = ("TorchElasticEnvironment", "SLURMEnvironment", "LSFEnvironment", "MPIEnvironment")
"""What Lightning looks for, and what tells a process of the others."""
_THIS_MACHINE = "127.0.0.1"


def require_machine(devices: int, num_nodes: int, *, on_gpu: bool) -> None:
    """Make sure that the processes of this machine have a place, and that those of others will be there.

    Args:
        devices: processes on each machine.
        num_nodes: machines.
        on_gpu: whether each process needs a GPU.

    Raises:
        UserError: there are too few GPUs or cores, or nothing starts processes on the other machines.
    """
    gpus = torch.cuda.device_count() if on_gpu else 0
    cores = os.cpu_count() or 1
    most = gpus or _PROCESSES_A_CORE * cores
    if devices > most:
        what = f"{gpus} GPUs" if gpus else f"{cores} cores, with {_PROCESSES_A_CORE} processes on each at most"
        raise UserError(f"train.devices must be at most {most} on this machine ({what}): got {devices}.")
    known = vars(environments)
    alone: Any = known["LightningEnvironment"]()
    managed = alone.creates_processes_externally or alone.main_address != _THIS_MACHINE
    if num_nodes > 1 and not managed and not any(known[launcher].detect() for launcher in _LAUNCHERS):
        raise UserError(
            f"train.num_nodes {num_nodes} needs a process on every machine, and here nothing starts them: use srun or "
            "torchrun (docs/guides/cluster.md), or train on this machine alone with train.num_nodes 1."
        )


def usable_accelerator(wanted: str) -> str:
    """What the Trainer is told for ``train.accelerator``: "auto" is a GPU of CUDA or ROCm where there is one, else the
    CPU.

    Left to Lightning, "auto" and "gpu" would be Apple's MPS on a Mac, which has no float64: statistics over a run could
    not be kept there.

    Raises:
        UserError: if a GPU is asked for and there is none.
    """
    if torch.cuda.is_available():
        return wanted
    if wanted == "gpu":
        has = "Apple's MPS, which has no float64, is not supported" if torch.backends.mps.is_available() else "got none"
        raise UserError(
            f"train.accelerator gpu needs a GPU that torch sees through torch.cuda (CUDA or ROCm): {has}. Say cpu."
        )
    return "cpu"
