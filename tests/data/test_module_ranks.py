"""Two real processes under a Trainer: disjoint halves of the same steps, evaluation once each, and resuming."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from tiny_corpus import SIZES, TinySource

from moekit.data.batch import Batch
from moekit.data.module import MultitaskData, TaskData

WORLD = 2


class Rendezvous(LightningEnvironment):
    """Processes that are started by the test, not by Lightning."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self.set_global_rank(rank)
        self.set_world_size(WORLD)

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._rank


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Any]] = {"train": [], "valid": [], "test": []}

    @staticmethod
    def rows(batch: Batch) -> list[list[int]]:
        return [row[keep].tolist() for row, keep in zip(batch.source, batch.source_mask, strict=True)]

    def training_step(self, batch: dict[str, Batch], _: int) -> torch.Tensor:
        self.seen["train"].append({name: self.rows(b) for name, b in batch.items()})
        return self.weight * 1.0

    def validation_step(self, batch: Batch) -> None:
        assert batch.index is not None
        self.seen["valid"].append([batch.task, batch.direction, batch.index.tolist()])

    def test_step(self, batch: Batch) -> None:
        assert batch.index is not None
        self.seen["test"].append([batch.task, batch.direction, batch.index.tolist()])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(cache: Path) -> MultitaskData:
    tasks = {"translation": TaskData(share=0.7), "denoising": TaskData(share=0.3)}
    return MultitaskData(
        TinySource(), tasks=tasks, cache=cache, vocab_size=400, tokens_per_step=2000, steps_per_epoch=6, progress=False
    )


def trainer(folder: Path, **changes: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **changes,
    )


def _work(rank: int, folder: Path) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)

        def strategy() -> DDPStrategy:
            return DDPStrategy(cluster_environment=Rendezvous(rank), process_group_backend="gloo")

        # Both processes find an empty cache: rank 0 builds, rank 1 waits and reads.
        first = Recorder()
        fit = trainer(folder, strategy=strategy(), devices=WORLD, max_steps=4, max_epochs=-1)
        fit.fit(first, datamodule=data(folder / "cache"))
        fit.save_checkpoint(folder / "four.ckpt")
        fit.test(first, datamodule=data(folder / "cache"), verbose=False)
        resumed = Recorder()
        again = trainer(folder, strategy=strategy(), devices=WORLD, max_steps=9, max_epochs=-1)
        again.fit(resumed, datamodule=data(folder / "cache"), ckpt_path=folder / "four.ckpt")
        (folder / f"{rank}.json").write_text(json.dumps([first.seen, resumed.seen]))
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_work, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("alone")
    model = Recorder()
    trainer(folder, devices=1, max_steps=9, max_epochs=-1).fit(model, datamodule=data(folder))
    return model.seen


def test_two_processes_take_the_steps_of_one(records: list[Any], alone: dict[str, list[Any]]) -> None:
    steps = [[*first["train"], *resumed["train"]] for first, resumed in records]
    assert [len(of_rank) for of_rank in steps] == [9, 9]
    for whole, *parts in zip(alone["train"], *steps, strict=True):
        for name, rows in whole.items():
            merged: list[Any] = [None] * len(rows)
            for rank, part in enumerate(parts):
                merged[rank::WORLD] = part[name]
            assert merged == rows


@pytest.mark.parametrize("split", ["valid", "test"])
def test_two_processes_evaluate_every_sentence_once(split: Any, records: list[Any]) -> None:
    seen: dict[tuple[str, str], list[int]] = {}
    for first, resumed in records:
        for task, direction, index in first["test"] if split == "test" else resumed["valid"]:
            seen.setdefault((task, direction), []).extend(index)
    streams = [("translation", str(direction)) for direction in TinySource().directions]
    if split == "valid":
        streams += [("denoising", language) for language in TinySource().languages]
    assert set(seen) == set(streams)
    assert all(sorted(found) == list(range(SIZES[split])) for found in seen.values())
