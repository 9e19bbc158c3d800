"""The most memory that training took."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


class PeakMemory(Callback):
    """Keeps the most memory that this process has held: of its GPU, allocated by torch; on a CPU, resident.

    Logged as ``train/peak_memory``, in bytes.

    Asking costs the GPU nothing. The resident set counts Python, torch and the data, too. Over stops and resumes the
    largest is kept in checkpoints, those of the first process.

    Args:
        forecast: bytes that training was expected to take, to be told beside. On a CPU what the process held before
            training is added: Python, torch, the data, and the weights once more.
    """

    def __init__(self, forecast: float | None = None) -> None:
        self._expected = forecast
        self._other = 0
        self._before = 0
        self._device = torch.device("cpu")

    @property
    def of(self) -> str:
        """Whose memory it is: "GPU" or "process"."""
        return "GPU" if self._device.type == "cuda" else "process"

    @property
    def bytes(self) -> int:
        """The most so far; 0 where nobody can tell."""
        return max(self._before, _peak(self._device))

    @property
    def forecast(self) -> float | None:
        """What was expected of this memory at its fullest; None if nothing was."""
        return None if self._expected is None else self._expected + self._other

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._other = _peak(self._device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer._logger_connector.should_update_logs and self.bytes:
            pl_module.log("train/peak_memory", float(self.bytes), batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "of": self.of, "forecast": self.forecast}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["bytes"] if state_dict["of"] == self.of else 0

    def text(self) -> str:
        """For example ``peak 1.25 GiB (forecast 1.10)``."""
        expected = "" if self.forecast is None else f" (forecast {self.forecast / 2**30:.2f})"
        return f"peak {self.bytes / 2**30:.2f} GiB{expected}"


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
