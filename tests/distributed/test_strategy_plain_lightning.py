"""Checkpoints between the Strategy and plain Lightning, there and back; copies of divided models, tied weights."""

from __future__ import annotations

import copy
import functools
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from case_group import folder, in_one_group
from checkpoint_runs import OFFLOADED, REPEATED, equal, on_rank_zero, train
from safetensors.torch import load_file
from small_lm import LAYOUTS, Sentences, SmallLM, one_process, trainer_for, whole_weights
from torch import nn

from moekit import ExpertParallelStrategy
from moekit.errors import UserError
from moekit.parallel import consolidate, gather_state_dict, is_checkpoint
from moekit.training.checkpoint_io import AtomicCheckpointIO
from moekit.training.whole_checkpoint import consolidate_checkpoint


def plainly(module: L.LightningModule, steps: int, path: Any = None, **options: Any) -> L.Trainer:
    """Train by plain Lightning on each rank for itself; all do, so that none is missed where one asks for others."""
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, gradient_clip_val=0.5, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, barebones=False, **options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(REPEATED, batch_size=8)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=path)
    return trainer


def from_plain_lightning() -> None:
    """A file of plain Lightning, of weights, optimizer, loops and callbacks, goes on under the Strategy."""
    expected = one_process(SmallLM(), REPEATED)["weights"]
    file = folder().with_suffix(".ckpt")
    before = plainly(SmallLM(), 3)
    on_rank_zero(lambda: before.save_checkpoint(file))
    for layout in (*LAYOUTS, {"expert_parallel_size": 2, "zero_stage": 1}, OFFLOADED):
        module = SmallLM()
        trainer = train(module, layout, 5, path=file)
        assert trainer.global_step == 5
        equal(module, expected)
    # A folder takes the place of the file.
    trainer.save_checkpoint(file)
    assert is_checkpoint(file)
    assert list(file.parent.glob(f".{file.name}*")) == []
    dist.barrier()  # rank 0 removes what the others look at
    trainer.strategy.remove_checkpoint(file)
    on_rank_zero(lambda: before.save_checkpoint(file))
    trainer.strategy.remove_checkpoint(file)
    dist.barrier()
    assert not file.exists()
    on_rank_zero(lambda: torch.save({"weight": torch.ones(2)}, file))
    with pytest.raises(UserError, match="has no state_dict and version of Lightning"):
        train(SmallLM(), LAYOUTS[0], 5, path=file)
    other = folder()
    on_rank_zero(other.mkdir)
    with pytest.raises(UserError, match="is a folder of something else"):
        train(SmallLM(), LAYOUTS[0], 5, path=other)


class Saved(SmallLM):
    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        self.save_hyperparameters()


def to_plain_lightning() -> None:
    """A sharded checkpoint as a file: it goes on by plain Lightning, and load_from_checkpoint takes it."""
    expected = one_process(SmallLM(), REPEATED)["weights"]
    for layout in (*LAYOUTS, OFFLOADED):
        place, module = folder(), Saved()
        train(module, layout, 3, place)
        weights = whole_weights(module)
        file = place.with_name(f"{place.name}.whole-{dist.get_rank()}")
        consolidate_checkpoint(place, file)
        loaded = Saved.load_from_checkpoint(file)
        assert loaded.hparams == {"optimizer": "adamw"}
        for name, value in loaded.named_parameters():
            assert torch.equal(value, weights[name]), name
        for path, options in ((file, {}), (place, {"plugins": [AtomicCheckpointIO()]})):
            other = Saved()
            trainer = plainly(other, 5, path, **options)
            assert trainer.global_step == 5
            for name, value in other.named_parameters():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        dist.barrier()
        on_rank_zero(functools.partial(trainer.save_checkpoint, place))  # a file takes the place of the folder
        assert place.is_file()


def a_plain_trainer_is_told() -> None:
    place = folder()
    train(SmallLM(), LAYOUTS[0], 1, place)

    with pytest.raises(IsADirectoryError) as refused:
        plainly(SmallLM(), 3, place)
    assert "consolidate_checkpoint(folder, file)" in refused.value.__notes__[0]


def copies_of_a_fitted_model() -> None:
    for layout in LAYOUTS:
        module = SmallLM()
        train(module, layout, 1)
        with pytest.raises(TypeError, match=r"load moekit\.parallel\.gather_state_dict\(model\) into it"):
            copy.deepcopy(module)
        plain, weights = SmallLM(), whole_weights(module)
        plain.load_state_dict(gather_state_dict(module))
        for name, value in plain.named_parameters():
            assert torch.equal(value, weights[name]), name


class Tied(SmallLM):
    """Has the table a second time, in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(*self.model.embedding.weight.shape)
        self.head.weight = self.model.embedding.weight
        self.register_buffer("mask", torch.arange(3.0))
        self.second = nn.Module()
        self.second.register_buffer("mask", self.mask)


def tied_weights() -> None:
    place, module = folder(), Tied()
    train(module, LAYOUTS[0], 2, place)
    whole = gather_state_dict(module)
    trainer = trainer_for(ExpertParallelStrategy(**LAYOUTS[1]))
    other = Tied()
    trainer.validate(other, datamodule=Sentences(REPEATED[:8]), ckpt_path=place, verbose=False)
    for name, value in gather_state_dict(other).items():
        assert torch.equal(value, whole[name]), name

    def alone() -> None:
        consolidate(place, place.with_suffix(".safetensors"))
        consolidate_checkpoint(place, place.with_suffix(".ckpt"))
        for state in (
            load_file(place.with_suffix(".safetensors")),
            torch.load(place.with_suffix(".ckpt"), weights_only=True)["state_dict"],
        ):
            plain = Tied()
            plain.load_state_dict(state)
            assert torch.equal(plain.head.weight, whole["model.embedding.weight"])
            assert plain.head.weight is plain.model.embedding.weight

    on_rank_zero(alone)


def weights_written_by_others() -> None:
    """An optimizer in host memory follows weights that `load_state_dict` has put in place of its own."""

    class Halve(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.load_state_dict({name: value * 0.5 for name, value in pl_module.state_dict().items()})

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 1:
                self.on_train_start(trainer, pl_module)

    expected = SmallLM("sgd")
    optimizer = expected.configure_optimizers()
    for ids in REPEATED[:16].split(8):
        expected.load_state_dict({name: value * 0.5 for name, value in expected.state_dict().items()})
        optimizer.zero_grad()
        expected.loss(ids).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
    for layout in (*LAYOUTS, OFFLOADED):
        module = SmallLM("sgd")
        train(module, layout, 2, callbacks=[Halve()])
        equal(module, dict(expected.named_parameters()))


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    from_plain_lightning,
    to_plain_lightning,
    a_plain_trainer_is_told,
    copies_of_a_fitted_model,
    tied_weights,
    weights_written_by_others,
)
