"""Which weights of training are kept and used: the best by a metric, averages over steps; and when to stop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from moekit.errors import UserError
from moekit.training.callbacks.best import BestCheckpoint
from moekit.training.checkpoint_io import load_checkpoint

AVERAGING = ("current_model_state", "averaging_state")
"""What a checkpoint with a `MovingAverage` holds beside the average: the weights of training, and a count."""


class Monitored(Protocol):
    """A module that knows the metrics of its validation; `moekit.training.multitask.MultitaskModule` does."""

    def monitor(self, name: str, task: str | None) -> tuple[str, Literal["min", "max"]]:
        """The metric that is meant by a name, and whether less or more of it is better."""


class Patience(EarlyStopping):
    """Lightning's EarlyStopping, whose patience a resumed run may change, and which says why training ended.

    Args:
        monitor: a metric that validation logs.
        mode: whether less or more of it is better.
        patience: validations without a better value after which training ends.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"], patience: int) -> None:
        super().__init__(monitor, mode=mode, patience=patience, check_on_train_epoch_end=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.wait_count >= self.patience and trainer.is_global_zero:
            text = f"Stopped after step {trainer.global_step}: {self.monitor} was not better than "
            text += f"{float(self.best_score):.4g} in {self.wait_count} validations (train.patience)."
            print(text, file=sys.stderr, flush=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})


class MovingAverage(WeightAveraging):
    """An exponential moving average of the weights, which validation measures and checkpoints hold.

    Checkpoints hold the weights of training beside it, with which a resumed run goes on. Buffers, such as tables and
    biases of routers, are not averaged.

    Args:
        decay: share of the average that each optimizer step keeps.

    Source: arXiv:1412.6980 section 7.2; the averaging is Lightning's and torch's. Differs: Lightning's callback ends
        training with the average in the place of the weights, so that a run could not go on from its last checkpoint.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the weights of training stay."""


class AverageOfLast(Checkpoint):
    """The mean of the weights of the last validations, written at the end of training as ``average.ckpt``.

    The weights are kept as ``step-N.ckpt``, so that a resumed run averages those from before its interruption too.
    What is no floating-point number is that of the end of training.

    Args:
        folder: where the checkpoints go.
        count: how many are averaged.

    Source: arXiv:1706.03762 section 6.1.
    """

    def __init__(self, folder: str | Path, count: int) -> None:
        self.folder, self.count = Path(folder), count

    def _kept(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.ckpt"), key=_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the average of an earlier end, and weights of steps that are taken again."""
        if trainer.is_global_zero:
            again = [path for path in self._kept() if _step(path) > trainer.global_step]
            for path in [self.folder / "average.ckpt", *again]:
                path.unlink(missing_ok=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt", weights_only=True)
        if trainer.is_global_zero:
            for path in self._kept()[: -self.count]:
                path.unlink()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()  # the first process removes files
        states = [load_checkpoint(path, mmap=True)["state_dict"] for path in self._kept()[-self.count :]]
        if not states:
            return
        own = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        averaged = dict(own)
        for name, value in own.items():
            if value.is_floating_point():
                total = sum(state[name].to(torch.float64) for state in states)
                averaged[name] = (total / len(states)).to(value.dtype)
        pl_module.load_state_dict(averaged)
        trainer.save_checkpoint(self.folder / "average.ckpt")
        pl_module.load_state_dict(own)


def _step(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def kept_weights(
    module: Monitored,
    folder: Path,
    *,
    task: str | None = None,
    validates: bool,
    best: str,
    patience: int,
    ema: float,
    average_last: int,
) -> list[Callback]:
    """The callbacks for the settings of a run of these names (``train.best`` and so on), in the order that they need.

    The loss, where nothing else is chosen, is that of `task`, else of the module's first.

    Raises:
        UserError: there is no such metric, or the settings exclude each other.
    """
    unasked = {"best": best, "patience": patience, "average_last": average_last}
    if not validates and (given := [f"train.{name}" for name, value in unasked.items() if value]):
        raise UserError(f"{' and '.join(given)} needs validations during training: set train.validate_every.")
    if ema and average_last:
        raise UserError("train.ema and train.average_last are two averages of the weights: set one of them.")
    monitor, mode = module.monitor(best, task)
    return [
        *([MovingAverage(ema)] if ema else []),
        *([Patience(monitor, mode, patience)] if patience else []),
        *([BestCheckpoint(folder, monitor=monitor, mode=mode)] if validates else []),
        *([AverageOfLast(folder, average_last)] if average_last else []),
    ]
