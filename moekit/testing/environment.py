"""Tell a Trainer that its processes are those of `run_distributed`."""

from __future__ import annotations

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment


class JoinedProcesses(ClusterEnvironment):
    """Processes that run already and have joined a process group, all on one node.

    Inside `run_distributed`: ``Trainer(devices=dist.get_world_size(), plugins=[JoinedProcesses()], ...)``.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """They are there."""
        return True

    @property
    def main_address(self) -> str:
        """Not needed: they have met."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Not needed: they have met."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Never chosen by itself."""
        return False

    def world_size(self) -> int:
        """How many processes."""
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        """Nothing to set."""

    def global_rank(self) -> int:
        """Number of this process."""
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        """Nothing to set."""

    def local_rank(self) -> int:
        """Number of this process on its node."""
        return dist.get_rank()

    def node_rank(self) -> int:
        """The only node."""
        return 0
