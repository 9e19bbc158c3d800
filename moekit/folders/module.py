"""The LightningModule of an adopted folder: losses of the learned tokens, and of the routers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moekit.errors import UserError
from moekit.folder_text.encoding import IGNORED
from moekit.folders.batches import FolderBatch
from moekit.folders.settings import TuneConfig
from moekit.huggingface import added_losses, adopt_folder, packed, routings
from moekit.routing import Routing
from moekit.surgery.adapters import add_adapters, is_adapter
from moekit.training.fine_tuning import subset, train_only
from moekit.training.schedules import per_step


class FolderModule(L.LightningModule):
    """Fine-tunes the adopted model of a folder, which is read when the Trainer asks for it.

    Logs ``train/loss`` (nats for a learned token of the batch, of all processes together in steps that loggers get and
    of this one in others), ``train/aux/<name>`` (unweighted losses of routers) and ``lr``; in validation
    ``valid/loss``, of all held-out tokens together.

    Args:
        folder: the folder of transformers.
        tune: what trains.
        optimizer: makes the optimizer from this module.
        schedule: makes the learning rate schedule.
        dtype: the type of the weights.
        divided: whether a strategy divides the model, which is then built without memory.
    """

    def __init__(
        self,
        folder: str | Path,
        tune: TuneConfig,
        *,
        optimizer: Callable[[nn.Module], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler],
        dtype: torch.dtype = torch.float32,
        divided: bool = False,
    ) -> None:
        super().__init__()
        self.folder, self.tune, self.dtype_of_weights, self.divided = Path(folder), tune, dtype, divided
        self._optimizer, self._schedule = optimizer, schedule
        self.model: Any = None
        self.heard: list[Routing] = []  # of the last training batch, for callbacks
        self._nll = self._count = torch.zeros(())

    def configure_model(self) -> None:
        """Build the model, once."""
        if self.model is None:
            self.model = adapted_model(
                self.folder, self.tune, device="meta" if self.divided else "cpu", dtype=self.dtype_of_weights
            ).train()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer and schedule, which moves once per optimizer step."""
        optimizer = self._optimizer(self)
        return per_step(optimizer, self._schedule(optimizer))  # type: ignore[return-value]

    def negative_log_likelihood(self, batch: FolderBatch) -> tuple[Tensor, list[Routing]]:
        """Float32[]: the sum over the learned tokens, and what the routers returned."""
        several = batch.packed
        rows = packed(self.model, batch.real, batch.sequence) if several else nullcontext()
        given = {"position_ids": batch.positions} if several else {"attention_mask": batch.real.long()}
        with routings(self.model) as heard, rows:
            logits = self.model(input_ids=batch.ids, use_cache=False, **given).logits
        scores, wanted = logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
        return F.cross_entropy(scores.float(), wanted, ignore_index=IGNORED, reduction="sum"), heard

    def training_step(self, batch: FolderBatch, batch_idx: int) -> Tensor:
        """Sum over the learned tokens / those of the step, and the routers' weighted losses.

        Ranks and accumulated batches are averaged, so that every learned token of the step counts alike.
        """
        nll, self.heard = self.negative_log_likelihood(batch)
        loss = nll / batch.predictions
        # Not the share above: rows with few learned tokens would look learned, and those with many unlearned.
        shown, count = nll.detach(), (batch.labels[:, 1:] != IGNORED).sum()
        if self._reports and self.trainer.world_size > 1:  # not by Lightning, which would do it at every step or never
            shown, count = (self.trainer.strategy.reduce(value, reduce_op="sum") for value in (shown, count))
        self.log("train/loss", shown / count.clamp(min=1), prog_bar=True, batch_size=1)
        aux = added_losses(self.model)
        if aux is not None and self.heard:
            extra, terms = aux(*self.heard)
            loss = loss + extra
            if self._reports:
                self.log_dict({f"train/aux/{name}": value.detach() for name, value in terms.items()}, batch_size=1)
        if self._reports:
            optimizer: Any = self.optimizers()
            self.log("lr", float(optimizer.param_groups[0]["lr"]), batch_size=1)
        return loss

    @property
    def _reports(self) -> bool:
        """Whether somebody will write what this step logs."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._nll = torch.zeros((), dtype=torch.float64, device=self.device)
        self._count = torch.zeros((), dtype=torch.float64, device=self.device)

    def validation_step(self, batch: FolderBatch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._nll += self.negative_log_likelihood(batch)[0].double()
        self._count += (batch.labels[:, 1:] != IGNORED).sum()

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all processes."""
        nll, count = self._nll, self._count
        if self.trainer.world_size > 1:
            nll, count = (self.trainer.strategy.reduce(value, reduce_op="sum") for value in (nll, count))
        self.log("valid/loss", (nll / count).float(), batch_size=1, prog_bar=True)


def adapted_model(folder: Path, tune: TuneConfig, *, device: str, dtype: torch.dtype) -> Any:
    """The adopted model of a folder with its adapters, of which the chosen parameters train.

    Raises:
        UserError: as `adopt_folder`; or the model has no such parameters.
    """
    with _unsaid():
        model = adopt_folder(folder, device=device, dtype=dtype)
    if model.config.is_encoder_decoder:
        raise UserError(
            f"finetune --model takes models that go on with a text: {folder} is an encoder-decoder, "
            f"{type(model).__name__}. Import it (moekit import), and fine-tune the run."
        )
    try:
        if tune.rank:
            add_adapters(model, rank=tune.rank, alpha=tune.alpha, targets=tune.targets)
        train_only(model, subset(tune.subset))
    except ValueError as error:
        raise UserError(f"fine_tune: {error}") from None
    if tune.rank and not any(tensor.requires_grad for name, tensor in model.named_parameters() if is_adapter(name)):
        raise UserError(
            f"fine_tune.rank {tune.rank} makes adapters, and fine_tune.tune {tune.tune} leaves them as they are. Leave "
            f"one of them out, or give --fine_tune.tune {tune.tune}+adapters."
        )
    return model


@contextmanager
def _unsaid() -> Iterator[None]:
    """Without the line that adoption logs of its losses: `finetune_folder` says it once, for all processes."""
    log = logging.getLogger("moekit.huggingface.adopt")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
