"""What outlives a step under the Strategy: averages of weights, checkpoints by Lightning's callbacks, and both."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from case_group import folder, in_one_group
from checkpoint_runs import train
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from safetensors.torch import load_file
from small_lm import (
    CLIP,
    GLOBAL_BATCH,
    LAYOUTS,
    Sentences,
    SmallLM,
    close,
    fit,
    one_process,
    sentences,
    trainer_for,
    whole_weights,
)
from torch import Tensor, nn

from moekit import ExpertParallelStrategy
from moekit.errors import UserError
from moekit.parallel import consolidate
from moekit.training.callbacks.random_state import RandomState
from moekit.training.checkpoint_state import load_state

DATA = sentences(3)
REPEATED = sentences(1).repeat(5, 1)  # a plain DataLoader begins anew when training is resumed


def weight_averaging() -> None:
    """Lightning's EMA callback, on divided weights, with validation between."""
    data, decay = DATA, 0.6
    module = SmallLM("sgd")
    optimizer = module.configure_optimizers()
    average = {name: p.detach().clone() for name, p in module.named_parameters()}
    for number, ids in enumerate(data.split(GLOBAL_BATCH)):
        optimizer.zero_grad()
        module.loss(ids).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        for name, p in module.named_parameters():
            average[name] = p.detach().clone() if number == 0 else decay * average[name] + (1 - decay) * p.detach()
    for layout in LAYOUTS:
        other = SmallLM("sgd")
        fit(other, ExpertParallelStrategy(**layout), data, callbacks=[EMAWeightAveraging(decay=decay)])
        for name, value in whole_weights(other).items():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)


def resuming() -> None:
    """Three steps, a checkpoint by Lightning's callback, two more steps: as if there had been no break."""
    data = REPEATED
    layouts = (*LAYOUTS, {"expert_parallel_size": 1, "zero_stage": 2, "offload": "optimizer"})
    expected = one_process(SmallLM(), data)
    for first, second, asynchronous in zip(layouts, (*layouts[1:], layouts[0]), (False, True) * 2, strict=True):
        place = folder()
        saver = ModelCheckpoint(place, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        strategy = ExpertParallelStrategy(**first, asynchronous_save=asynchronous)
        trainer_for(
            strategy, callbacks=[saver, LearningRateMonitor()], max_steps=3, enable_checkpointing=True, logger=True,
            default_root_dir=place,
        ).fit(SmallLM(), datamodule=Sentences(data))  # fmt: skip
        dist.barrier()
        assert sorted(p.name for p in place.glob("step=*")) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
        resumed = SmallLM()
        trainer = trainer_for(ExpertParallelStrategy(**second), max_steps=5)
        trainer.fit(resumed, datamodule=Sentences(data), ckpt_path=place / "step=3.ckpt")
        assert trainer.global_step == 5
        for name, value in whole_weights(resumed).items():
            torch.testing.assert_close(value, expected["weights"][name], rtol=1e-5, atol=1e-6, msg=name)


def averages_in_checkpoints() -> None:
    """A checkpoint of averaged weights holds both; resuming goes on with both."""
    data, place = REPEATED, folder()

    def train(layout: dict[str, Any], steps: int, saver: Any = None, path: Any = None) -> Any:
        module = SmallLM("sgd")
        callbacks = [EMAWeightAveraging(decay=0.6), *([saver] if saver else [])]
        trainer = trainer_for(
            ExpertParallelStrategy(**layout), callbacks=callbacks, max_steps=steps, enable_checkpointing=bool(saver)
        )
        trainer.fit(module, datamodule=Sentences(data), ckpt_path=path)
        return whole_weights(module)

    expected = train(LAYOUTS[0], 5)
    train(LAYOUTS[0], 3, ModelCheckpoint(place, filename="{step}", every_n_train_steps=3))
    for name, value in train(LAYOUTS[1], 5, path=place / "step=3.ckpt").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


class Judged(SmallLM):
    """Is tested by the loss that it is validated by, and predicts."""

    def __init__(self) -> None:
        super().__init__("sgd", aux={"router_z": 0.01})

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model.logits(self.model.decode(batch).hidden)


class WholeBatches(L.LightningDataModule):
    """For the one process that the others are compared with."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(DATA, batch_size=GLOBAL_BATCH)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def averages_are_read_back() -> None:
    """What a checkpoint, a file made of it, a test and a prediction have are the weights that were monitored."""
    for make in (lambda: EMAWeightAveraging(decay=0.6), WeightAveraging):
        place, name = folder(), "best"
        quiet_options: dict[str, Any] = {
            "max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "gradient_clip_val": CLIP,
        }  # fmt: skip
        plain = Judged()
        saver = ModelCheckpoint(place / f"plain-{dist.get_rank()}", filename=name, monitor="valid")
        trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[make(), saver], **quiet_options)
        trainer.fit(plain, datamodule=WholeBatches())
        monitored = float(trainer.callback_metrics["valid"])
        expected = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
        plain.load_state_dict(expected)
        for number, layout in enumerate(LAYOUTS):
            callbacks = [make(), ModelCheckpoint(place / str(number), filename=name, monitor="valid")]
            trainer = trainer_for(
                ExpertParallelStrategy(**layout), callbacks=callbacks, enable_checkpointing=True, max_epochs=2,
                limit_val_batches=1.0,
            )  # fmt: skip
            trainer.fit(Judged(), datamodule=Sentences(DATA))
            assert float(trainer.callback_metrics["valid"]) == pytest.approx(monitored, rel=1e-5)
            path = place / str(number) / f"{name}.ckpt"
            dist.barrier()
            if dist.get_rank() == 0:
                consolidate(path, path.with_suffix(".safetensors"))
            dist.barrier()
            for found in (load_file(path.with_suffix(".safetensors")), load_state(path).weights):
                assert found.keys() == expected.keys()
                for key, value in found.items():
                    torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)
            trainer = trainer_for(ExpertParallelStrategy(**layout), use_distributed_sampler=False)
            loader = torch.utils.data.DataLoader(DATA, batch_size=GLOBAL_BATCH)  # type: ignore[arg-type]
            tested = trainer.test(Judged(), loader, ckpt_path=str(path), verbose=False)[0]["test"]
            assert tested == pytest.approx(monitored, rel=1e-5)
            answers = trainer.predict(Judged(), loader, ckpt_path=str(path))
            assert answers is not None
            right = Judged.predict_step(plain, DATA, 0)
            torch.testing.assert_close(torch.cat(answers), right, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def a_second_fit_keeps_the_layout() -> None:
    """The first fit has divided the weights; optimizer state may be divided anew, weights may not."""
    module = SmallLM()
    fit(module, ExpertParallelStrategy(2, zero_stage=0), DATA[:GLOBAL_BATCH])
    fit(module, ExpertParallelStrategy("auto", zero_stage=1), DATA[:GLOBAL_BATCH])
    for other, words in (
        (ExpertParallelStrategy(2, zero_stage=3), "zero_stage was 0, got 3"),
        (ExpertParallelStrategy(1, zero_stage=0), "expert_parallel_size was 2, got 1"),
        (ExpertParallelStrategy("auto", zero_stage=0, offload="parameters"), "offload was 'none', got 'parameters'"),
    ):
        with pytest.raises(UserError, match=words):
            fit(module, other, DATA[:GLOBAL_BATCH])


class Stop(L.Callback):
    """Ends training after the first batch."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = True


def gradients_of_a_step_that_was_not_taken() -> None:
    """A fit that ends between two micro-batches leaves nothing to the next one."""
    options: dict[str, Any] = {"optimizer": "sgd", "aux": {"router_z": 0.01}}
    expected = one_process(SmallLM(**options), DATA)
    over_replicas = {"expert_parallel_size": 1, "replicas": 2, "zero_stage": 3}
    for layout in (*LAYOUTS, {"expert_parallel_size": 1, "zero_stage": 2}, over_replicas):
        module = SmallLM(**options)
        trainer = trainer_for(ExpertParallelStrategy(**layout), callbacks=[Stop()], accumulate_grad_batches=2)
        trainer.fit(module, datamodule=Sentences(DATA, micro=2))
        assert trainer.global_step == 0
        module.losses.clear()
        close(fit(module, ExpertParallelStrategy(**layout), DATA, micro=2), expected)


class Drawing(SmallLM):
    """Draws a number in every step."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.drawn: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        return super().training_step(batch, batch_idx)


def drawn_by_all(layout: dict[str, Any], steps: int, place: Any = None, path: Any = None, state: Any = None) -> Any:
    """What each rank draws in a run that writes a checkpoint to `place`, and begins with that of `path`, or a state."""
    module, callback = Drawing(), RandomState()
    if state is not None:
        callback.load_state_dict(state)
    torch.manual_seed(dist.get_rank() // layout.get("tensor_parallel_size", 1))
    train(module, layout, steps, place, path, callbacks=[callback])
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (module.drawn, callback.state_dict()))
    return found


def random_numbers_of_another_layout() -> None:
    """A data rank goes on where it was; partners draw the same, also from what former versions have written."""
    data, partners = LAYOUTS[0], LAYOUTS[2]
    (first, _), (second, _) = drawn_by_all(data, 4)
    assert not set(first) & set(second)
    place = folder()
    for layout, expected in ((data, [first, second]), (partners, [first, first])):
        assert len(drawn_by_all(layout, 2, place)[0][1]["data_ranks"]) == len(set(map(tuple, expected)))
        assert [drawn for drawn, _ in drawn_by_all(layout, 4, path=place)] == [drawn[2:] for drawn in expected]
    drawn_by_all(data, 2, place)
    assert [drawn for drawn, _ in drawn_by_all(partners, 4, path=place)] == [first[2:]] * 2
    drawn_by_all(partners, 2, place)
    (goes_on, _), (new, _) = drawn_by_all(data, 4, path=place)
    assert goes_on == first[2:]
    assert not set(new) & {*first, *second}
    former = {"processes": drawn_by_all(data, 2)[0][1]["data_ranks"]}
    assert [drawn for drawn, _ in drawn_by_all(data, 2, state=former)] == [first[2:], second[2:]]
    assert [drawn for drawn, _ in drawn_by_all(partners, 2, state=former)] == [first[2:]] * 2


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    weight_averaging,
    resuming,
    averages_in_checkpoints,
    averages_are_read_back,
    a_second_fit_keeps_the_layout,
    gradients_of_a_step_that_was_not_taken,
    random_numbers_of_another_layout,
)
