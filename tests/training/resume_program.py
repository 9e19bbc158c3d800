"""A small training run in a process of its own, to be killed and resumed by test_resume.py.

Everything that could break equality is in it: dropout, Python's and NumPy's random numbers in the step, validation
that draws too, gradient accumulation, several epochs, a schedule, and a component whose state moves per step.
"""

from __future__ import annotations

import logging
import random
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moekit.component import Component
from moekit.training.budget import Budget
from moekit.training.callbacks.best import BestCheckpoint
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.limits import MaxMinutes
from moekit.training.callbacks.random_state import RandomState
from moekit.training.checkpoint_io import AtomicCheckpointIO
from moekit.training.loggers import CsvLogger
from moekit.training.optimizers import adamw
from moekit.training.schedules import Cosine, per_step

BATCHES, STEPS = 10, 24  # batches of an epoch, two of them a step: five steps an epoch


class Batches:
    """Order a function of (seed, epoch); says where it stands."""

    def __init__(self) -> None:
        self.epoch = self.place = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Tensor]:
        for place in range(self.place, BATCHES):
            generator = torch.Generator().manual_seed(1000 * self.epoch + place)
            # Lightning asks a loader with a length for no more than its last batch: roll over before handing it out.
            self.epoch, self.place = (self.epoch + 1, 0) if place + 1 == BATCHES else (self.epoch, place + 1)
            yield torch.randn(4, 8, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


class Endless(Batches):
    """The same without length and end: Lightning then takes one batch ahead, so it counts what was handed out."""

    __len__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            generator = torch.Generator().manual_seed(self.place)
            self.place += 1
            yield torch.randn(4, 8, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place - 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Moving(Component):
    """Scales by a buffer that moves once per optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def on_step_end(self, step: int) -> None:
        self.scale *= 1 + 0.01 * step


class Model(L.LightningModule):
    def __init__(self, pause: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), Moving(), nn.Linear(16, 8))
        self.pause = pause

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        time.sleep(self.pause)
        noise = random.random() + np.random.rand()
        loss = self.net(batch).square().mean() + noise * self.net(batch).mean()
        self.log("train/loss", loss)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        torch.rand(3)
        self.log("valid/loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self, lr=1e-2)
        return per_step(optimizer, Cosine(optimizer, STEPS, warmup=3))


class Tear(Callback):
    """Kills the process in the middle of a save: half of the bytes are written."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            import os
            import signal

            def torn(checkpoint: Any, file: Any) -> None:
                file.write(b"PK" + bytes(1000))
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = torn


def main(folder: Path, pause: float, loader: str, resume: bool, tear: int) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    model = Model(pause)
    if resume:
        random.random(), torch.rand(5)  # a resumed process is elsewhere in its random streams
    checkpoints = folder / "checkpoints"
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        logger=CsvLogger(folder),
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            RandomState(),
            MaxMinutes(Budget(max_steps=STEPS)),
            Tear(tear),
            BestCheckpoint(checkpoints, monitor="valid/loss"),
            Resumable(checkpoints, every_n_steps=2, every_n_minutes=None, how_to_resume="program --resume"),
        ],
    )
    valid = DataLoader(TensorDataset(torch.ones(6, 8)), batch_size=2)
    path = checkpoints / "last.ckpt"
    trainer.fit(
        model,
        Endless() if loader == "endless" else Batches(),
        valid,
        ckpt_path=path if resume and path.exists() else None,
    )
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    (folder / "end.txt").write_text(f"{weights.sum().item()!r} {model.net[2].scale.item()!r}")


if __name__ == "__main__":
    place, pause, loader, resume, tear = sys.argv[1:]
    main(Path(place), float(pause), loader, resume == "resume", int(tear))
