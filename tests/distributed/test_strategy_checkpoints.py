"""What Lightning promises about checkpoints, under the Strategy: hooks, strictness, other models, hyperparameters."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from case_group import folder, in_one_group
from checkpoint_runs import OFFLOADED, REPEATED, equal, on_rank_zero, train
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from small_lm import LAYOUTS, Sentences, SmallLM, one_process, trainer_for, whole_weights
from torch import Tensor, nn

from moekit import ExpertParallelStrategy
from moekit.errors import UserError
from moekit.parallel import gather_state_dict, is_checkpoint
from moekit.parallel.checkpoint import read_extra
from moekit.training.whole_checkpoint import consolidate_checkpoint

W_IN = "model.decoder.layers.1.feed_forward.experts.w_in"


# -- what hooks change ------------------------------------------------------------------------------------------------


class Renamed(SmallLM):
    """Was written when `temperature` had another name, `w_in` two experts more, and a table that is gone."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state["heat"] = state.pop("temperature")
        whole = state[W_IN].full_tensor()
        state[W_IN] = torch.cat([whole, 7 * torch.ones_like(whole[:2])])
        state["old.table"] = torch.arange(3)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        assert state.pop("old.table").tolist() == [0, 1, 2]
        state["temperature"] = state.pop("heat") + 1
        state[W_IN] = state[W_IN][:4]
        checkpoint["seen"] = True


def edits_of_a_state_dict() -> None:
    for first, second in zip(LAYOUTS, (*LAYOUTS[1:], LAYOUTS[0]), strict=True):
        place, module = folder(), Renamed()
        train(module, first, 2, place)
        weights = whole_weights(module)
        weights["temperature"] = weights["temperature"] + 1
        with pytest.raises(UserError, match="of another model: it has no temperature, and the model has no heat"):
            train(SmallLM(), second, 3, path=place)
        other = Renamed()
        trainer = trainer_for(ExpertParallelStrategy(**second))
        trainer.validate(other, datamodule=Sentences(REPEATED[:8]), ckpt_path=place, verbose=False)
        equal(other, weights, 1e-7)
        resumed = Renamed()  # optimizer state as well
        assert train(resumed, second, 2, path=place).global_step == 2
        equal(resumed, weights, 1e-7)


class Fresh(SmallLM):
    """Starts with new optimizers."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"] = []


class Meddles(SmallLM):
    """Puts something into a checkpoint."""

    change: Any = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.change(checkpoint)


def edits_of_optimizer_states() -> None:
    place = folder()
    two = [dict(LAYOUTS[0]), OFFLOADED]
    for layout in two:
        first = SmallLM()
        train(first, layout, 3, place)
        expected = SmallLM()
        expected.load_state_dict(gather_state_dict(first))
        after = one_process(expected, REPEATED[:8])["weights"]  # one step by a new optimizer
        module = Fresh()
        train(module, two[1 - two.index(layout)], 4, path=place)
        equal(module, after)
    module = Meddles()
    module.change = lambda checkpoint: checkpoint["optimizer_states"].clear()
    train(module, LAYOUTS[0], 1, place)
    with pytest.raises(UserError, match="the state of 1 optimizers: it has that of 0"):
        train(SmallLM(), LAYOUTS[0], 2, path=place)

    class Drops(Fresh):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([{"params": [p]} for p in self.parameters()], lr=0.1)

    train(SmallLM(), LAYOUTS[0], 1, place)
    with pytest.raises(UserError, match="groups the parameters of optimizer 0 otherwise"):
        train(type("Keeps", (Drops,), {"on_load_checkpoint": lambda *_: None})(), LAYOUTS[0], 2, path=place)
    assert train(Drops(), LAYOUTS[0], 2, path=place).global_step == 2


def edits_that_cannot_be_saved() -> None:
    for change, error in (
        (lambda c: c.pop("state_dict"), r'must leave a state dict in checkpoint\["state_dict"\].*got NoneType'),
        (lambda c: c["optimizer_states"][0].update(a=1), r'must leave checkpoint\["optimizer_states"\] as it is'),
        (lambda c: c.update(mine={"at": [Path("x")]}), r"checkpoint\['mine'\]\['at'\]\[0\] is of type PosixPath"),
    ):
        module = Meddles()
        module.change = change
        with pytest.raises(TypeError, match=error):
            train(module, LAYOUTS[0], 1, folder())
    with pytest.raises(TypeError, match="takes no storage_options"):
        train(SmallLM(), LAYOUTS[0], 1).save_checkpoint(folder(), storage_options={})


# -- strictness -------------------------------------------------------------------------------------------------------


class Loose(SmallLM):
    """Saves no table, and has a weight more when it is loaded."""

    def __init__(self, more: bool = False) -> None:
        super().__init__()
        self.strict_loading = False
        if more:
            self.more = nn.Parameter(torch.full((4,), 3.0))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["model.embedding.weight"]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (self.more.sum() * 0 if hasattr(self, "more") else 0)


def strict_loading() -> None:
    for layout in LAYOUTS[:2]:
        place, module = folder(), Loose()
        train(module, layout, 2, place)
        saved = whole_weights(module)
        other = Loose(more=True)
        with torch.no_grad():
            other.model.embedding.weight.fill_(0.25)
        trainer = trainer_for(ExpertParallelStrategy(**layout))
        trainer.validate(other, datamodule=Sentences(REPEATED[:8]), ckpt_path=place, verbose=False)
        found = whole_weights(other)
        assert found.pop("more").tolist() == [3.0] * 4
        assert found.pop("model.embedding.weight").unique().tolist() == [0.25]
        for name, value in found.items():
            assert torch.equal(value, saved[name]), name
        # Refused, and nothing is filled.
        strict = SmallLM()
        before = {name: value.detach().clone() for name, value in strict.named_parameters()}
        trainer = trainer_for(ExpertParallelStrategy(**layout))
        with pytest.raises(UserError, match=r"it has no model\.embedding\.weight, and the model has no \(nothing\)"):
            trainer.validate(strict, datamodule=Sentences(REPEATED[:8]), ckpt_path=place, verbose=False)
        equal(strict, before, 1e-9)

        class Wider(Loose):
            def __init__(self) -> None:
                super().__init__()
                self.temperature = nn.Parameter(torch.ones(2))

        trainer = trainer_for(ExpertParallelStrategy(**layout))
        with pytest.raises(UserError, match=r"temperature has shape \(\) there and \(2,\) here"):
            trainer.validate(Wider(), datamodule=Sentences(REPEATED[:8]), ckpt_path=place, verbose=False)


# -- one Trainer, several models, several loops ------------------------------------------------------------------------


class Evaluated(SmallLM):
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)


def the_best_of_weights_alone() -> None:
    """Fit with checkpoints of weights alone; test, validate and predict the best; another model; save again."""
    for layout in (*LAYOUTS, OFFLOADED):
        place = folder()
        saver = ModelCheckpoint(place, save_weights_only=True, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = trainer_for(
            ExpertParallelStrategy(**layout),
            callbacks=[saver],
            limit_val_batches=1.0,
            max_steps=2,
            enable_checkpointing=True,
        )
        module, data = Evaluated(), Sentences(REPEATED)
        trainer.fit(module, datamodule=data)
        weights = whole_weights(module)
        with torch.no_grad():
            module.temperature.add_(5.0)
        loader = torch.utils.data.DataLoader(REPEATED[:8], batch_size=4)  # type: ignore[arg-type]
        saver.best_model_path = str(place / "step=2.ckpt")
        first = trainer.test(module, loader, ckpt_path="best", verbose=False)[0]["test"]
        equal(module, weights, 1e-9)
        assert trainer.validate(module, loader, ckpt_path="best", verbose=False)[0]["valid"] == pytest.approx(first)
        assert trainer.predict(module, loader, ckpt_path="best") is not None
        trainer.save_checkpoint(folder())
        with pytest.raises(UserError, match="it has weights only"):
            trainer.fit(Evaluated(), datamodule=data, ckpt_path=place / "step=2.ckpt")
        other, after = Evaluated(), folder()
        trainer.test(other, loader, verbose=False)
        trainer.save_checkpoint(after)
        found = trainer.test(other, loader, ckpt_path=after, verbose=False)[0]["test"]
        assert found != pytest.approx(first)
        trainer.test(module, loader, ckpt_path="best", verbose=False)


# -- hyperparameters and states ----------------------------------------------------------------------------------------


@dataclass
class Settings:
    width: int = 3


class Mode(Enum):
    FAST = 1


class Noted(SmallLM):
    """Has hyperparameters of all kinds."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


GIVEN: dict[str, Any] = {
    "at": Path("a/b"),
    "make": functools.partial(nn.Linear, 3),
    "settings": Settings(),
    "kind": nn.GELU,
    "rate": np.float64(0.5),
    "count": np.int64(3),
    "mode": Mode.FAST,
    "layers": [1, ("x", None), {"deep": Path("c")}],
    "type": torch.bfloat16,
    "call": dist.barrier,
}


class Stateful(L.Callback):
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.state}


class Data(Sentences):
    def __init__(self) -> None:
        super().__init__(REPEATED)
        self.save_hyperparameters({"root": Path("d")})


def hyperparameters() -> None:
    """Training goes on, with text where there is no plain data, and says so before it begins."""
    place = folder()
    saver = ModelCheckpoint(place, filename="{step}", every_n_train_steps=1)
    trainer = trainer_for(
        ExpertParallelStrategy(**LAYOUTS[0]), callbacks=[saver, Stateful(np.float32(2))], max_steps=1,
        enable_checkpointing=True,
    )  # fmt: skip
    if dist.get_rank() == 0:
        with pytest.warns(
            UserWarning, match=r"kept as text in checkpoints: at \(PosixPath\), make \(partial\), .*root"
        ):
            trainer.fit(Noted(**GIVEN), datamodule=Data())
    else:
        trainer.fit(Noted(**GIVEN), datamodule=Data())
    saved = read_extra(place / "step=1.ckpt")["checkpoint"]
    found = saved["hyper_parameters"]
    assert saved["datamodule_hyper_parameters"] == {"root": "d"}
    assert saved["callbacks"]["Stateful"] == {"kept": 2.0}
    assert found == {
        "at": "a/b",
        "make": repr(GIVEN["make"]),
        "settings": "Settings(width=3)",
        "kind": "torch.nn.modules.activation.GELU",
        "rate": 0.5,
        "count": 3,
        "mode": "<Mode.FAST: 1>",
        "layers": [1, ("x", None), {"deep": "c"}],
        "type": torch.bfloat16,
        "call": "torch.distributed.distributed_c10d.barrier",
    }
    file = place / "whole"

    def alone() -> None:
        consolidate_checkpoint(place / "step=1.ckpt", file)
        assert Noted.load_from_checkpoint(file, at=Path("z")).hparams["at"] == Path("z")

    on_rank_zero(alone)


def states_that_are_no_plain_data() -> None:
    """Refused before the first step where checkpoints will be written."""
    started: list[int] = []

    class Counts(SmallLM):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            started.append(batch_idx)
            return super().training_step(batch, batch_idx)

    class Scheduled(Counts):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

            class Rate:
                def __init__(self) -> None:
                    self.where = Path("x")

                def __call__(self, step: int) -> float:
                    return 1.0

            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, Rate())]

    def attempt(module: SmallLM, callbacks: list[Any], **options: Any) -> None:
        saver = ModelCheckpoint(folder(), every_n_train_steps=1)
        trainer = trainer_for(
            ExpertParallelStrategy(**LAYOUTS[0]), callbacks=[saver, *callbacks], enable_checkpointing=True, **options
        )
        trainer.fit(module, datamodule=Sentences(REPEATED))

    with pytest.raises(TypeError, match=r"checkpoint\['callbacks'\]\['Stateful'\]\['kept'\] is of type Settings"):
        attempt(Counts(), [Stateful(Settings())])
    with pytest.raises(TypeError, match=r"checkpoint\['lr_schedulers'\]\[0\]\['lr_lambdas'\].* is of type PosixPath"):
        attempt(Scheduled(), [])
    assert started == []

    class Later(Stateful):  # has its state when training has begun
        def state_dict(self) -> dict[str, Any]:
            return {"kept": self.begun}  # type: ignore[attr-defined]

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.begun = 1

    attempt(Counts(), [Later(None)], max_steps=1)


# -- refused before training -------------------------------------------------------------------------------------------


class Normed(SmallLM):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)


def refused_by_name() -> None:
    strategy = ExpertParallelStrategy(**LAYOUTS[0])
    with pytest.raises(UserError, match=r"sync_batchnorm=True is not supported .* would leave norm to"):
        trainer_for(strategy, sync_batchnorm=True).fit(Normed(), datamodule=Sentences(REPEATED))
    trainer_for(ExpertParallelStrategy(**LAYOUTS[0]), sync_batchnorm=True, max_steps=1).fit(
        SmallLM(), datamodule=Sentences(REPEATED)
    )
    with pytest.raises(TypeError, match=r"got the plugin TorchCheckpointIO\. Leave it out; asynchronous_save=True"):
        L.Trainer(strategy=ExpertParallelStrategy(1), accelerator="cpu", plugins=[TorchCheckpointIO()], logger=False)
    saver = ModelCheckpoint("memory://somewhere", every_n_train_steps=1)
    with pytest.raises(UserError, match=r"on a file system of this machine.*got memory://somewhere"):
        trainer_for(ExpertParallelStrategy(**LAYOUTS[0]), callbacks=[saver], enable_checkpointing=True).fit(
            SmallLM(), datamodule=Sentences(REPEATED)
        )
    trainer = train(SmallLM(), LAYOUTS[0], 1)
    with pytest.raises(UserError, match="got s3://bucket/x"):
        trainer.save_checkpoint("s3://bucket/x")
    place = folder()
    trainer.save_checkpoint(f"file://{place}")
    assert is_checkpoint(place)
    with pytest.raises(UserError, match="got s3://bucket/x"):
        train(SmallLM(), LAYOUTS[0], 2, path="s3://bucket/x")


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    edits_of_a_state_dict,
    edits_of_optimizer_states,
    edits_that_cannot_be_saved,
    strict_loading,
    the_best_of_weights_alone,
    hyperparameters,
    states_that_are_no_plain_data,
    refused_by_name,
)
