"""A run that is stopped anywhere and resumed sees exactly the batches that it would have seen."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny_corpus import TinySource

from moekit.data.batch import Batch
from moekit.data.module import MultitaskData, TaskData
from moekit.errors import UserError

EPOCH = 7


def checksum(step: dict[str, Batch]) -> str:
    state = hashlib.sha256()
    for name, batch in sorted(step.items()):
        state.update(name.encode())
        for tensor in (batch.source, batch.target, batch.labels, batch.source_language):
            if tensor is not None:
                state.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return state.hexdigest()[:12]


class Recorder(L.LightningModule):
    """Trains one number and writes down every batch it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def training_step(self, batch: dict[str, Batch], _: int) -> torch.Tensor:
        self.seen.append(checksum(batch))
        return self.weight * 1.0

    def validation_step(self, batch: Batch, _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):
    """Writes a checkpoint at each place where a run may be stopped; like ModelCheckpoint, not inside accumulation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: L.Trainer, where: str) -> None:
        batch_progress = trainer.fit_loop.epoch_loop.batch_progress
        if batch_progress.current.ready % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.folder / f"{batch_progress.total.ready:02}-{where}.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "epoch")


def data(cache: Path, **changes: Any) -> MultitaskData:
    tasks = {"translation": TaskData(share=0.7), "denoising": TaskData(share=0.3)}
    settings = {"tokens_per_step": 800, "vocab_size": 400, "steps_per_epoch": EPOCH, "valid_sentences": 3, **changes}
    return MultitaskData(TinySource(), tasks=tasks, cache=cache, progress=False, **settings)


def trainer(folder: Path, *callbacks: Callback, **changes: Any) -> L.Trainer:
    settings: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 2, **changes}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks) or None,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **settings,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    data(folder).prepare_data()
    return folder


CASES = {
    "plain": {"limit_val_batches": 0},
    "validation in the middle": {"val_check_interval": 3, "max_epochs": 2},
    "validation by steps": {"val_check_interval": 5, "check_val_every_n_epoch": None, "max_epochs": 2},
    "accumulation": {"limit_val_batches": 0, "accumulate_grad_batches": 2},
    "steps, not epochs": {"limit_val_batches": 0, "max_epochs": -1, "max_steps": 17},
    "short epochs": {"limit_val_batches": 0, "limit_train_batches": 4},
    "accumulation and validation": {"accumulate_grad_batches": 2, "val_check_interval": 4, "max_epochs": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_runs_see_the_batches_that_an_uninterrupted_run_sees(case: str, cache: Path, tmp_path: Path) -> None:
    whole = Recorder()
    trainer(tmp_path, SaveEverywhere(tmp_path), **CASES[case]).fit(whole, datamodule=data(cache))
    assert len(set(whole.seen)) == len(whole.seen) >= 12
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 6
    wrong = {}
    for checkpoint in checkpoints:
        done = int(checkpoint.name[:2])
        resumed = Recorder()
        trainer(tmp_path, **CASES[case]).fit(resumed, datamodule=data(cache), ckpt_path=checkpoint)
        if resumed.seen != whole.seen[done:]:
            wrong[checkpoint.name] = [whole.seen.index(seen) for seen in resumed.seen if seen in whole.seen]
    assert not wrong, "batches seen by the resumed runs"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_order_and_resume_too(num_workers: int, cache: Path, tmp_path: Path) -> None:
    whole = Recorder()
    trainer(tmp_path, max_epochs=2).fit(whole, datamodule=data(cache))
    first = Recorder()
    trainer(tmp_path, SaveEverywhere(tmp_path), max_epochs=2).fit(
        first, datamodule=data(cache, num_workers=num_workers)
    )
    assert first.seen == whole.seen
    resumed = Recorder()
    trainer(tmp_path, max_epochs=2).fit(
        resumed, datamodule=data(cache, num_workers=num_workers), ckpt_path=tmp_path / "05-batch.ckpt"
    )
    assert resumed.seen == whole.seen[5:]


def test_a_checkpoint_from_other_data_is_refused(cache: Path, tmp_path: Path) -> None:
    trainer(tmp_path, SaveEverywhere(tmp_path), max_epochs=1).fit(Recorder(), datamodule=data(cache))
    with pytest.raises(UserError, match=r"data\.seed: 0 in the checkpoint, 1 now"):
        trainer(tmp_path).fit(Recorder(), datamodule=data(cache, seed=1), ckpt_path=tmp_path / "02-batch.ckpt")
