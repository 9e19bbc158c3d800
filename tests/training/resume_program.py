"""A small training run, to be killed in a process of its own and resumed by test_resume.py.

Everything that could break equality is in it: dropout, Python's and NumPy's random numbers in the step, validation
that draws too, gradient accumulation, several epochs, a schedule, and a component whose state moves per step.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
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
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.rows = slice(rank, None, world)  # each process its share of every batch

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Tensor]:
        for place in range(self.place, BATCHES):
            generator = torch.Generator().manual_seed(1000 * self.epoch + place)
            # Lightning asks a loader with a length for no more than its last batch: roll over before handing it out.
            self.epoch, self.place = (self.epoch + 1, 0) if place + 1 == BATCHES else (self.epoch, place + 1)
            yield torch.randn(4, 8, generator=generator)[self.rows]

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
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), Moving(), nn.Linear(16, 8))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        noise = random.random() + np.random.rand()
        loss = self.net(batch).square().mean() + noise * self.net(batch).mean()
        self.log("train/loss", loss, sync_dist=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        torch.rand(3)
        self.log("valid/loss", self.net(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self, lr=1e-2)
        return per_step(optimizer, Cosine(optimizer, STEPS, warmup=3))


@dataclass
class Strike(Callback):
    """Sends this process a signal at a chosen moment of a step (counted from 1).

    Attributes:
        name: for example "TERM".
        step: the optimizer step in which, or after which, it comes.
        where: "first batch" or "second batch" of the step's two, "validation" after it, or "save": in the middle of
            writing the checkpoint of the step.
    """

    name: str
    step: int
    where: str

    def send(self, trainer: L.Trainer, where: str, step: int) -> None:
        here = trainer.world_size == 1 or trainer.global_rank == 1
        if here and (where, step) == (self.where, self.step) and not trainer.sanity_checking:
            os.kill(os.getpid(), getattr(signal, f"SIG{self.name}"))

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.send(trainer, ["first batch", "second batch"][index % 2], trainer.global_step + 1)

    def on_validation_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int, loader: int = 0
    ) -> None:
        if index == 1:
            self.send(trainer, "validation", trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (self.where, self.step) == ("save", trainer.global_step):

            def torn(checkpoint: Any, file: Any) -> None:
                file.write(b"PK" + bytes(1000))
                file.flush()
                self.send(trainer, "save", self.step)

            torch.save = torn
        if (self.where, self.step) == ("saved", trainer.global_step):
            save = trainer.save_checkpoint

            def saved(path: Any, *given: Any, **more: Any) -> None:
                save(path, *given, **more)
                if Path(path).name == "last.ckpt":
                    self.send(trainer, "saved", self.step)

            trainer.save_checkpoint = saved  # type: ignore[method-assign]


def main(folder: Path, loader: str, resume: bool, strike: Strike | None) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    model = Model()
    path = folder / "checkpoints" / "last.ckpt"
    resume = resume and path.exists()
    if resume:
        random.random(), torch.rand(5)  # a resumed process is elsewhere in its random streams
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy="ddp" if "WORLD_SIZE" in os.environ else "auto",
        use_distributed_sampler=False,
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
            *([strike] if strike else []),
            BestCheckpoint(path.parent, monitor="valid/loss"),
            Resumable(path.parent, every_n_steps=2, every_n_minutes=None, how_to_resume="program --resume"),
        ],
    )
    valid = DataLoader(TensorDataset(torch.ones(6, 8)), batch_size=2)
    trainer.fit(
        model,
        Endless() if loader == "endless" else Batches(),
        valid,
        ckpt_path=path if resume else None,
    )
    if not trainer.is_global_zero:
        return
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    (folder / "end.txt").write_text(f"{weights.sum().item()!r} {model.net[2].scale.item()!r}")


def in_process(
    folder: Path, loader: str, resume: bool, strike: Strike | None, rank: int, world: int, port: int
) -> None:
    """`main` as the target of a process, with its standard error in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    errors = os.open(folder / f"errors{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    if world > 1:  # as torchrun would say it
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    main(folder, loader, resume, strike)
