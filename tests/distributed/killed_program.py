"""A training run with checkpoints, started by a real launcher and perhaps killed: see test_killed_jobs.py."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_lm import GLOBAL_BATCH, SmallLM, sentences

from moekit.parallel.checkpoint import writer
from moekit.training.strategy import ExpertParallelStrategy

STEPS = 6


class Kill(L.Callback):
    """SIGKILL for one rank in the backward of a step, or in the middle of the checkpoint after it."""

    def __init__(self, folder: Path, moment: str, rank: int, step: int) -> None:
        self.folder, self.moment, self.rank, self.step = folder, moment, rank, step

    def die(self, *_: Any, **__: Any) -> None:
        (self.folder / "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: torch.Tensor) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            if self.moment == "step":
                loss.register_hook(self.die)
            if self.moment == "save":
                writer.save_file = self.die  # type: ignore[assignment]


class Losses(L.Callback):
    """Losses by step, as all ranks together have them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.losses = folder, {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        mean = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        self.losses[trainer.global_step] = float(mean)
        if trainer.is_global_zero:
            (self.folder / "losses.json").write_text(json.dumps(self.losses))


class BySteps(SmallLM):
    """Batches are a function of the step and the rank, so that a resumed run reads on where it was."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        ids = sentences(STEPS).split(GLOBAL_BATCH)[self.global_step]
        return super().training_step(ids.chunk(self.trainer.world_size)[self.global_rank], batch_idx)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moment", default="never")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--step", type=int, default=3)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--zero-stage", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    checkpoints = ModelCheckpoint(
        options.folder, "last", every_n_train_steps=2, save_top_k=1, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ExpertParallelStrategy(2, zero_stage=options.zero_stage),
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            checkpoints,
            Losses(options.folder),
            Kill(options.folder, options.moment, options.rank, options.step),
        ],
    )
    loader: Any = torch.utils.data.DataLoader(torch.zeros(2 * STEPS))  # type: ignore[arg-type]
    path = options.folder / "last.ckpt" if options.resume else None
    trainer.fit(BySteps(by_tokens=True), loader, ckpt_path=path)


if __name__ == "__main__":
    main()
