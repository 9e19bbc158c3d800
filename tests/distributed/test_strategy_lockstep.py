"""Ranks that part: other numbers of batches, a skipped layer, a missing loss, a rank that stops.

All end with a message that names rank and step, and do so before the timeout where a rank goes on with something else.
"""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from case_group import in_one_group
from small_lm import LAYOUTS, SmallLM, fit, quiet, sentences, trainer_for
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from moekit import ExpertParallelStrategy
from moekit.errors import UserError
from moekit.parallel.lockstep import Lockstep, OutOfStepError
from moekit.testing import run_distributed

DATA = sentences(3)
FOUR_SENTENCES = 4
SECONDS = 20.0


class Endless(IterableDataset[Tensor]):
    """Batches of this rank, of a number that nobody is told."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(DATA[: self.batches * FOUR_SENTENCES].split(FOUR_SENTENCES))


def loader(batches: int, *, sized: bool) -> DataLoader[Tensor]:
    if sized:
        return DataLoader(DATA[: batches * FOUR_SENTENCES], batch_size=FOUR_SENTENCES)  # type: ignore[arg-type]
    return DataLoader(Endless(batches), batch_size=None)


def parted(module: L.LightningModule, layout: dict[str, Any], match: str, data: Any = None, **options: Any) -> None:
    """The run ends on this rank, at once, with words that match."""
    begun = time.monotonic()
    trainer = trainer_for(
        ExpertParallelStrategy(**layout, timeout=timedelta(seconds=SECONDS)),
        use_distributed_sampler=False,
        **options,
    )
    with pytest.raises(OutOfStepError, match=match):
        trainer.fit(module, loader(3, sized=True) if data is None else data)
    assert time.monotonic() - begun < SECONDS / 2


def lengths_that_are_known() -> None:
    """Refused before the first step; the number that all have is accepted, and so is what ends by steps."""
    for layout in LAYOUTS[:2]:
        mine = 3 + 2 * dist.get_rank()
        module = SmallLM("sgd")
        strategy = ExpertParallelStrategy(**layout)
        words = r"equally many training batches: rank 0 has 3, rank 1 has 5\. Use limit_train_batches=3"
        with pytest.raises(UserError, match=words):
            trainer_for(strategy, use_distributed_sampler=False).fit(module, loader(mine, sized=True))
        assert not module.losses
        for options in ({"limit_train_batches": 3}, {"max_steps": 3, "max_epochs": -1}):
            module = SmallLM("sgd")
            trainer = trainer_for(ExpertParallelStrategy(**layout), use_distributed_sampler=False, **options)
            trainer.fit(module, loader(mine, sized=True))
            assert len(module.losses) == 3


def lengths_that_are_not_known() -> None:
    """Said in the last batch that all have, before the end, another epoch or validation; steps may end earlier."""
    where = "(train, batch 2 of epoch 0, step 2)"
    places = [f"the last training batch {where}", f"a training batch {where}"]
    me, other = dist.get_rank(), 1 - dist.get_rank()
    words = f"rank {other} is about to start {places[other]}, where rank {me} is about to start {places[me]}"
    for layout in LAYOUTS[:2]:
        for epochs in (1, 2):
            parted(SmallLM("sgd"), layout, re.escape(words), loader(3 + me, sized=False), max_epochs=epochs)
        trainer = trainer_for(ExpertParallelStrategy(**layout), use_distributed_sampler=False, max_steps=3)
        trainer.fit(SmallLM("sgd"), loader(3 + me, sized=False))
        assert trainer.global_step == 3


class SkipsALayer(SmallLM):
    """In its second step rank 1 leaves a block of the network out: the sparse one, or a dense one."""

    def __init__(self, block: int) -> None:
        super().__init__("sgd", aux={})
        self.block = block

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        blocks = self.model.decoder.layers
        if batch_idx != 1 or dist.get_rank() != 1:
            return super().training_step(batch, batch_idx)
        try:
            self.model.decoder.layers = torch.nn.ModuleList([b for n, b in enumerate(blocks) if n != self.block])
            return super().training_step(batch, batch_idx)
        finally:
            self.model.decoder.layers = blocks


def a_skipped_layer() -> None:
    """Blocks are of equal size: without the comparison they would get each other's weights."""
    for layout in ({"expert_parallel_size": 1}, LAYOUTS[0], LAYOUTS[1]):
        for block in (0, 1):
            where = rf"model\.decoder\.layers\.{block} \(train, batch 1 of epoch 0, step 1\)"
            after = rf"model\.decoder\.layers\.{block + 1} \(train, batch 1 of epoch 0, step 1\)"
            match = f"{where}, where rank 1.*{after}" if dist.get_rank() == 1 else f"rank 1.*{after}, where.*{where}"
            parted(SkipsALayer(block), layout, match)


class NoGradients(SmallLM):
    """Steps by hand; in the second step rank 1 leaves backward out."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        if batch_idx != 1 or dist.get_rank() != 1:
            self.manual_backward(loss)
        optimizer.step()


def a_missing_backward() -> None:
    for layout in LAYOUTS[:2]:
        match = "rank 0 .*backward.*batch 1" if dist.get_rank() == 1 else "rank 1 .*optimizer's step.*batch 1"
        parted(NoGradients("sgd"), layout, match, gradient_clip_val=None)


class Asks(SmallLM):
    """Rank 0 alone asks for something that all ranks must give."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 1 and dist.get_rank() == 0:
            self.trainer.strategy.barrier()
        return super().training_step(batch, batch_idx)


def a_barrier_for_one() -> None:
    match = r"rank 0 .*a barrier \(train, batch 1 .*where rank 1.*layers\.0 .*batch 1"
    other = r"rank 1 .*layers\.0 \(train, batch 1 .*where rank 0.*a barrier .*batch 1"
    parted(Asks("sgd"), LAYOUTS[0], other if dist.get_rank() == 0 else match)


def evaluation() -> None:
    """Other numbers of batches in evaluation: refused where forwards communicate, right where they do not."""
    mine = 2 + dist.get_rank()

    def validate(layout: dict[str, Any]) -> Any:
        strategy = ExpertParallelStrategy(**layout)
        trainer = trainer_for(strategy, use_distributed_sampler=False, limit_val_batches=1.0)
        return trainer.validate(SmallLM("sgd"), loader(mine, sized=False), verbose=False)

    assert len(validate({"expert_parallel_size": 1, "zero_stage": 1})) == 1
    for layout in LAYOUTS[:2]:
        with pytest.raises(OutOfStepError, match=r"the last validation batch .validate, batch 1 of epoch 0, step 0"):
            validate(layout)


def what_is_left_on_the_model() -> None:
    """Nothing: hooks go with the run."""
    module = SmallLM("sgd")
    with quiet():
        fit(module, ExpertParallelStrategy(2), DATA)
    hooks = [hook for m in module.modules() for hook in m._forward_pre_hooks.values()]
    assert not [hook for hook in hooks if type(hook).__name__ == "_Watch"]


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    lengths_that_are_known,
    lengths_that_are_not_known,
    a_skipped_layer,
    a_missing_backward,
    a_barrier_for_one,
    evaluation,
    what_is_left_on_the_model,
)


def neighbours_that_differ() -> list[str]:
    """Rank 2 of four is elsewhere: it and the next one say so. Then rank 3 stops: 0 hears nothing, 2 is not heard."""
    timeout, rank = timedelta(seconds=5), dist.get_rank()
    said = []
    for who in (2, 3):
        points = Lockstep(["here", "there"], ["setup"], timeout)
        points.meet("here")
        begun = time.monotonic()
        try:
            if (who, rank) != (3, 3):
                points.meet("there" if (who, rank) == (2, 2) else "here")
        except OutOfStepError as error:
            said.append(str(error))
            assert who == 2 or 4.0 < time.monotonic() - begun < 15.0
        dist.barrier()
    return said


def test_two_of_a_ring_notice() -> None:
    said = run_distributed(neighbours_that_differ, 4, timeout=60.0)
    assert said[1] == []
    assert said[2][0].startswith("rank 1 is about to start here (setup, epoch 0, step 0), where rank 2")
    assert said[3][0].startswith("rank 2 is about to start there")
    assert len(said[3]) == len(said[0]) == 1
    assert all("waits for rank 3" in words for words in said[2][1:])
    assert said[0][0].startswith("rank 0 is about to start here")
    silent = "waits for rank 3, which has ended or said nothing for 0:00:05. It was last about to start here"
    assert silent in said[0][0]


def passes() -> list[str]:
    """With lockstep="batch" ranks tell what they have passed when they meet."""
    points = Lockstep(["here", "a", "b"], ["setup"], timedelta(seconds=20), each=False)
    module = torch.nn.Identity()
    handles = [points.watch(module, name) for name in ("a", "b")]
    said = []
    for left in (0, 1):
        with points.step():
            if dist.get_rank() < left:
                handles[1].remove()
            module(torch.ones(1))
        try:
            points.meet("here")
        except OutOfStepError as error:
            said.append(str(error))
    points.forget()
    points.meet("here")
    return said


def test_passed_layers_are_compared() -> None:
    words = "have passed other layers, or in another order, before they were about to start here"
    said = run_distributed(passes, 2)
    assert [len(found) for found in said] == [1, 1]
    assert all(words in found[0] for found in said)


def numbers() -> list[str]:
    points = Lockstep(["here"], ["setup"])
    points.require_equal(float("inf"), "things", "Use {least}.")
    try:
        points.require_equal([4.0, float("inf")][dist.get_rank()], "things", "Use {least}.")
    except UserError as error:
        return [str(error)]
    return []


def test_numbers_that_differ() -> None:
    words = "all ranks must have equally many things: rank 0 has 4, rank 1 has inf. Use 4."
    assert run_distributed(numbers, 2) == [[words], [words]]
