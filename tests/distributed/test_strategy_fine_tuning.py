"""Callbacks that change what trains, and averages of weights, under the Strategy: they end as in one process."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from case_group import folder, in_one_group
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from small_lm import CLIP, FEW_LAYOUTS, GLOBAL_BATCH, Sentences, SmallLM, alike, fit, sentences, trainer_for
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from moekit import ExpertParallelStrategy

DATA = sentences(3)


class Backbone(SmallLM):
    """Trains what requires a gradient; its backbone is the decoder."""

    @property
    def backbone(self) -> nn.Module:
        return self.model.decoder

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


class Unfreezes(BaseFinetuning):
    """Experts train from the second epoch on."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.model.decoder.layers[1])

    def finetune_function(self, module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.model.decoder.layers[1], optimizer)


class AllSentences(L.LightningDataModule):
    """For the one process that the others are compared with."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(DATA, batch_size=GLOBAL_BATCH)  # type: ignore[arg-type]


def by_plain_lightning(module: L.LightningModule, callback: L.Callback, epochs: int, **options: Any) -> Any:
    """One process, Lightning's own strategy. Each rank does the same, so collectives of the router agree."""
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, gradient_clip_val=CLIP, logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
        **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=AllSentences())
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def fine_tuning_callbacks() -> None:
    """BaseFinetuning and BackboneFinetuning, which is one, end as they do in plain Lightning."""
    of_backbone = functools.partial(BackboneFinetuning, 1, backbone_initial_lr=1e-3, verbose=False)
    for make, layouts in ((Unfreezes, FEW_LAYOUTS), (of_backbone, FEW_LAYOUTS[1:2])):
        expected = by_plain_lightning(Backbone(), make(), 3)
        for layout in layouts:
            module = Backbone()
            fit(module, ExpertParallelStrategy(**layout), DATA, max_epochs=3, callbacks=[make()])
            alike(module, expected)


def fine_tuning_is_resumed() -> None:
    """A checkpoint from after the unfreezing gives the optimizer its groups back."""
    for layout in FEW_LAYOUTS[1:]:
        place = folder()

        def train(epochs: int, path: Any = None, saver: Any = None, layout: Any = layout) -> Any:
            module = Backbone()
            callbacks = [Unfreezes(), *([saver] if saver else [])]
            trainer = trainer_for(
                ExpertParallelStrategy(**layout),
                callbacks=callbacks,
                max_epochs=epochs,
                enable_checkpointing=bool(saver),
            )
            trainer.fit(module, datamodule=Sentences(DATA), ckpt_path=path)
            return trainer, module

        train(2, saver=ModelCheckpoint(place, filename="{epoch}"))
        dist.barrier()
        trainer, _ = train(3, path=place / "epoch=1.ckpt")
        groups = trainer.optimizers[0].param_groups
        assert [group["lr"] for group in groups] == pytest.approx([1e-2 * 0.9**3, 1e-2 * 0.9 / 10 * 0.9**2])
        assert len(trainer.optimizers[0].state) == sum(len(group["params"]) for group in groups)


def stochastic_weight_averaging() -> None:
    expected = by_plain_lightning(SmallLM("sgd"), StochasticWeightAveraging(1e-2, swa_epoch_start=1), 3)
    for layout in FEW_LAYOUTS:
        module = SmallLM("sgd")
        callback = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
        fit(module, ExpertParallelStrategy(**layout), DATA, max_epochs=3, callbacks=[callback])
        alike(module, expected)


class OwnAverage(SmallLM):
    """Keeps an average of its model in a submodule, by torch's class."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.model, avg_fn=get_ema_avg_fn(0.6))

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([*self.model.parameters(), self.temperature], lr=1e-2)

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update_parameters(self.model)


def an_average_in_a_submodule() -> None:
    plain = OwnAverage()
    optimizer = plain.configure_optimizers()
    for ids in DATA.split(GLOBAL_BATCH):
        optimizer.zero_grad()
        plain.loss(ids).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        optimizer.step()
        plain.average.update_parameters(plain.model)
    for layout in FEW_LAYOUTS:
        module = OwnAverage()
        fit(module, ExpertParallelStrategy(**layout), DATA)
        alike(module, plain)


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    fine_tuning_callbacks,
    fine_tuning_is_resumed,
    stochastic_weight_averaging,
    an_average_in_a_submodule,
)
