"""The best checkpoint by a validation metric."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from moekit.training.agreement import everybody


class BestCheckpoint(Checkpoint):
    """Writes ``best.ckpt`` after each validation that is better than all before, resumed runs included.

    With several processes the first one's value counts: saving is done by all together. Log the metric with
    ``sync_dist=True`` where processes validate on different data.

    Args:
        folder: where ``best.ckpt`` goes.
        monitor: a logged metric, for example ``"valid/translation/loss"``.
        mode: whether lower ("min") or higher ("max") is better.

    Raises:
        ValueError: if `mode` is another one.

    Differs: Lightning's ModelCheckpoint forgets its best when the folder was moved or renamed; this does not.
    """

    def __init__(self, folder: str | Path, *, monitor: str, mode: Literal["min", "max"] = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f'BestCheckpoint.mode must be "min" or "max": got {mode!r}.')
        self.path = Path(folder) / "best.ckpt"
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise ValueError on all processes, naming the metrics that there are, if `monitor` was not logged."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        logged = trainer.callback_metrics.get(self.monitor)
        value = everybody(trainer, None if logged is None else float(logged))[0]
        if value is None:
            names = sorted(name for name in trainer.callback_metrics if name.startswith("valid"))
            raise ValueError(
                f"BestCheckpoint.monitor must be logged in validation: got {self.monitor!r}. Logged were {names}."
            )
        better = self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        if better and not math.isnan(value):  # NaN would stay the best for ever
            self.best = value
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
