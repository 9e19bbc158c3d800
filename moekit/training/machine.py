"""Whether the processes of a run have a place: on this machine, and on others that something starts them on."""

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
