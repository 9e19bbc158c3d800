"""A recipe's command in a process of its own, as torchrun would start it; see test_killed_anywhere.py."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path


def in_process(arguments: list[str], rank: int, world: int, port: int, log: Path) -> None:
    """The command ``run`` of `switch`; what it prints is in the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1, file=output)  # where it stands, should it outlive a killed one
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    import torch
    from lightning.fabric.utilities import rank_zero_only

    rank_zero_only.rank = rank  # as where lightning is imported with these variables
    torch.set_num_threads(1)
    from moekit.cli.recipes import main
    from moekit.recipes import switch

    sys.exit(main(switch.RECIPE, ["run", *arguments]))
