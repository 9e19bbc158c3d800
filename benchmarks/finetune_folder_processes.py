"""Fine-tuning on several processes, beside transformers with FSDP2: `finetune_folder.py --processes 2` prints it.

The floor is the model of transformers, `torch.distributed.fsdp.fully_shard` on each decoder layer and on the whole, in
a plain loop: forward, backward, torch's clipping, fused AdamW. Beside it is what `moekit finetune --model` trains, the
adopted model under `ExpertParallelStrategy`, whose processes divide the experts. It is trained by a Trainer, without
callbacks, and the Trainer's own work counts as moekit's. All read their weights from one folder, and each process has
rows of its own, the same ones for every arm.

Arms take turns step by step, in each process in the same order. A step begins and ends when all processes are there.
Losses and gradient norms of every step, which come of the steps before it, are compared: where an arm's differ from
the floor's, nothing is reported.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import transformers
from finetune_folder_model import Measured, batch_of, loss_of
from interleaved import interleaved, refuse
from lightning.pytorch.callbacks import Callback
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from moekit import ExpertParallelStrategy
from moekit.folders.batches import FolderBatch
from moekit.folders.module import FolderModule
from moekit.folders.settings import TuneConfig
from moekit.huggingface import adopt_folder
from moekit.performance import keep_memory
from moekit.testing import JoinedProcesses, run_distributed
from moekit.training.optimizers import adamw
from moekit.training.quiet import quiet

FLOOR = "transformers, FSDP2"
STAGES = (3, 1, 0)
MAX_NORM = 1.0
TOLERANCES = {"loss": 1e-4, "gradient norm": 1e-3}
"""Largest relative differences. A balance loss with the usual weight already changes the loss by more."""
WARM_UP = 2
_ARENA_MAX = -8  # of mallopt, as malloc.h has it

optimizer_of = partial(adamw, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0)


@dataclass
class Record:
    """What an arm computed, step by step: this rank's loss, and the norm of all gradients before clipping."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


class Stepwise(Callback):
    """A Trainer whose `step` trains one batch: it runs in a thread of its own, and stands still in between.

    Args:
        fit: calls ``fit`` of a Trainer that has this callback.
    """

    keeps_gradients = True  # as the strategy asks: it then need not find their norm again

    def __init__(self, fit: Callable[[Stepwise], None]) -> None:
        self.record = Record()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(fit,), daemon=True)

    def _run(self, fit: Callable[[Stepwise], None]) -> None:
        torch.set_num_threads(1)  # each thread has its own number
        try:
            self._go.acquire()
            fit(self)
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()

    def step(self) -> None:
        """Until the end of the next batch, or of training; raises what training raised."""
        if not self._thread.is_alive():
            self._thread.start()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Note the norm that the strategy found."""
        strategy: Any = trainer.strategy
        self.record.norms.append(float(strategy.gradient_norm))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stand still."""
        self.record.losses.append(float(outputs["loss"]))
        self._done.release()
        self._go.acquire()


class Adopted(FolderModule):
    """Without the routers' losses, which transformers does not add."""

    def configure_model(self) -> None:
        """Build the model, once."""
        if self.model is None:
            self.model = adopt_folder(self.folder, device="meta", aux=None, dtype=self.dtype_of_weights).train()


def fit(folder: Path, batch: FolderBatch, steps: int, stage: Any, stepwise: Stepwise) -> None:
    """Train the adopted model with a Trainer."""
    module = Adopted(
        folder, TuneConfig(), optimizer=optimizer_of, schedule=lambda o: LambdaLR(o, lambda _: 1.0), divided=True
    )
    ranks = dist.get_world_size()
    trainer = L.Trainer(
        max_steps=steps, gradient_clip_val=MAX_NORM, accelerator="cpu", devices=ranks, plugins=[JoinedProcesses()],
        strategy=ExpertParallelStrategy(ranks, zero_stage=stage), callbacks=[stepwise], use_distributed_sampler=False,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]


class FullySharded:
    """The model of transformers, divided by FSDP2 and trained by a plain loop."""

    def __init__(self, folder: Path, batch: FolderBatch) -> None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="grouped_mm"
        )
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        self.model, self.batch, self.record = model.train(), batch, Record()
        self.optimizer = optimizer_of(model)

    def step(self) -> None:
        """Train one batch."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.model, self.batch, adopted=False)
        loss.backward()
        # `clip_grad_norm_` is these two, but the strategy puts its own in their place while its Trainers run.
        parameters = list(self.model.parameters())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        clip_grads_with_norm_(parameters, MAX_NORM, norm)
        self.optimizer.step()
        self.record.losses.append(float(loss.detach()))
        self.record.norms.append(float(norm.full_tensor()))  # type: ignore[operator]


def together(folder: str, rows: int, length: int, vocab_size: int, rounds: int) -> dict[str, Any]:
    """Seconds, losses and norms of all arms; a rank of the group."""
    if keep_memory():  # in the first thread's heap, so that the Trainers' threads have to use it too
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    transformers.utils.logging.disable_progress_bar()
    place, steps = Path(folder), WARM_UP + rounds
    batch = batch_of(rows, length, vocab_size, dist.get_rank(), dist.get_world_size())
    with quiet():
        floor = FullySharded(place, batch)
        trainers = {f"moekit, ZeRO {stage}": Stepwise(partial(fit, place, batch, steps, stage)) for stage in STAGES}
        arms: dict[str, FullySharded | Stepwise] = {FLOOR: floor, **trainers}
        seconds = interleaved({name: arm.step for name, arm in arms.items()}, rounds, WARM_UP, wait=dist.barrier)
        for trainer in reversed(trainers.values()):  # each takes back what it changed when it began
            trainer.step()
    return {
        "seconds": seconds,
        "losses": {name: arm.record.losses for name, arm in arms.items()},
        "norms": {name: arm.record.norms for name, arm in arms.items()},
        "tokens": int(batch.num_tokens()),
    }


def require_equal_steps(found: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Refuse to report arms that do not train as the floor does.

    Args:
        found: values of every step, by what they are, one of `TOLERANCES`, and by arm.
    """
    for what, arms in found.items():
        for name, values in arms.items():
            for step, (one, other) in enumerate(zip(arms[FLOOR], values, strict=True)):
                if not math.isfinite(one) or not abs(one - other) <= TOLERANCES[what] * abs(one):
                    refuse(f"the {what} of step {step} differs: {one} of {FLOOR}, {other} of {name}")


def measure(folder: Path, processes: int, rows: int, length: int, vocab_size: int, rounds: int) -> Measured:
    """What `together` measures, of all processes.

    Wall seconds are those of the slowest process, processor seconds those of all together. Exits if losses or gradient
    norms differ.
    """
    every = run_distributed(together, processes, str(folder), rows, length, vocab_size, rounds, timeout=3600)
    losses = {
        name: [statistics.mean(values) for values in zip(*(part["losses"][name] for part in every), strict=True)]
        for name in every[0]["losses"]
    }
    require_equal_steps({"loss": losses, "gradient norm": every[0]["norms"]})
    joined: dict[str, Callable[[Sequence[float]], float]] = {"wall": max, "processor": sum}
    seconds = {
        name: {
            clock: [join(values) for values in zip(*(part["seconds"][name][clock] for part in every), strict=True)]
            for clock, join in joined.items()
        }
        for name in losses
    }
    return Measured(seconds, sum(part["tokens"] for part in every), losses)
