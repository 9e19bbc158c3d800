"""What the grid does not vary: accumulation, recomputation, odd batches, failures, other loops.

All cases run in one pair of processes; each has its own test.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from case_group import in_one_group
from small_lm import (
    CLIP,
    GLOBAL_BATCH,
    LAYOUTS,
    LENGTH,
    VOCABULARY,
    AllToOne,
    SmallLM,
    close,
    fit,
    one_process,
    sentences,
    trainer_for,
    whole_weights,
)
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from moekit import ExpertParallelStrategy
from moekit.errors import NonFiniteError
from moekit.parallel import ShardingPlan, layers_of, no_layers, unused_gradients
from moekit.testing import run_distributed
from moekit.training.callbacks.non_finite import NonFinite
from moekit.transformer import Block

STEPS = 3
DATA = sentences(STEPS)


def padded(data: Tensor) -> Tensor:
    """Sentences of unequal lengths, padding behind."""
    length = torch.randint(2, LENGTH + 2, (len(data),), generator=torch.Generator().manual_seed(1))
    return data.masked_fill(torch.arange(LENGTH + 1) >= length[:, None], 0)


class Rows(L.LightningDataModule):
    """Given rows of every global batch to every rank."""

    def __init__(self, data: Tensor, rows: list[list[int]]) -> None:
        super().__init__()
        self.data, self.rows = data, rows

    def train_dataloader(self) -> Any:
        mine = self.rows[self.trainer.strategy.distributed_sampler_kwargs["rank"]]
        batches = [batch[mine] for batch in self.data.split(GLOBAL_BATCH)]
        return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def accumulation() -> None:
    """Micro-batches of one sentence a rank are one batch (without the balance loss, which is not a mean)."""
    z_loss = {"router_z": 0.01}
    expected = one_process(SmallLM(aux=z_loss), DATA)
    for layout in (*LAYOUTS, {"expert_parallel_size": 1, "replicas": 2, "zero_stage": 3}):
        strategy = ExpertParallelStrategy(**layout)
        micro = 4 * strategy.tensor_parallel_size
        close(fit(SmallLM(aux=z_loss), strategy, DATA, micro=micro), expected)


class CountReductions(L.Callback):
    """How many gradients were brought together in each batch."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.found.append(0)
        self.original = _fsdp_param_group.foreach_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.found[-1] += 1
            return self.original(*args, **kwargs)

        _fsdp_param_group.foreach_reduce = counted  # type: ignore[assignment]

    def on_train_batch_end(self, *_: Any) -> None:
        _fsdp_param_group.foreach_reduce = self.original


def accumulation_is_silent() -> None:
    """Stages 0 to 2 reduce no gradient in a micro-batch that is not the last; stage 3 keeps gradients divided."""
    for stage, silent in ((2, True), (3, False)):
        count = CountReductions()
        strategy = ExpertParallelStrategy(1, zero_stage=stage)  # type: ignore[arg-type]
        fit(SmallLM("sgd"), strategy, DATA, micro=4, callbacks=[count])
        assert len(count.found) == 4 * STEPS
        for step in range(STEPS):
            *early, last = count.found[4 * step : 4 * step + 4]
            assert last > 0, count.found
            assert all((number == 0) == silent for number in early), count.found


def recomputation() -> None:
    """Activation checkpointing changes nothing, whatever gathers its weights together."""
    expected = one_process(SmallLM("sgd"), DATA)
    for layout in LAYOUTS:
        for wrap in (no_layers, layers_of(Block)):
            strategy = ExpertParallelStrategy(**layout, plan=ShardingPlan(wrap=wrap))
            close(fit(SmallLM("sgd", checkpoint=True), strategy, DATA), expected)


def a_rank_without_tokens() -> None:
    """Rank 1 has nothing but padding, in a batch of the same shape and in an empty one."""
    data = padded(DATA.clone())
    data[1::2] = 0
    options: dict[str, Any] = {"aux": {"load_balance": 0.1}, "by_tokens": True}
    expected = one_process(SmallLM("sgd", **options), data)
    for layout in LAYOUTS[:2]:
        close(fit(SmallLM("sgd", **options), ExpertParallelStrategy(**layout), data), expected)
        rows = Rows(data, [[0, 2, 4, 6], []])
        got = fit(SmallLM("sgd", **options), ExpertParallelStrategy(**layout), rows, use_distributed_sampler=False)
        close(got, expected)


class OneSided(SmallLM):
    """Has a weight that the first data rank alone uses."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.side = nn.Parameter(torch.linspace(-1.0, 1.0, 6))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        share: Any = self.trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
        loss = super().training_step(batch, batch_idx)
        return loss + share["num_replicas"] * self.side.square().sum() if share["rank"] == 0 else loss


class Sided(OneSided):
    """The same for one process."""

    def loss(self, ids: Tensor) -> Tensor:
        return super().loss(ids) + self.side.square().sum()


def weights_that_a_rank_does_not_use() -> None:
    """By torch, and as it is done for a torch that cannot."""
    expected = one_process(Sided(), DATA)
    native = unused_gradients.NATIVE
    for by_torch in {native, False}:
        unused_gradients.NATIVE = by_torch
        try:
            for layout in LAYOUTS[:2]:
                got = fit(OneSided(), ExpertParallelStrategy(**layout), DATA)
                close({**got, "losses": expected["losses"]}, expected)  # the step's own, without the side
        finally:
            unused_gradients.NATIVE = native


class Intermittent(SmallLM):
    """Has a weight that takes no part in every second step."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.side = nn.Parameter(torch.linspace(-1.0, 1.0, 6))
        self.turn = 0

    def loss(self, ids: Tensor) -> Tensor:
        self.turn += 1
        loss = super().loss(ids)
        return loss + self.side.square().sum() if self.turn % 2 else loss


def weights_that_no_rank_uses() -> None:
    """They have no gradient, so neither momentum nor decay moves them."""
    native = unused_gradients.NATIVE
    for optimizer in ("sgd", "adamw"):
        expected = one_process(Intermittent(optimizer), DATA)
        for by_torch in {native, False}:
            unused_gradients.NATIVE = by_torch
            try:
                for layout in LAYOUTS:
                    close(fit(Intermittent(optimizer), ExpertParallelStrategy(**layout), DATA), expected)
            finally:
                unused_gradients.NATIVE = native


class InTurns(SmallLM):
    """Has two weights, each of which takes part in every second micro-batch."""

    def __init__(self) -> None:
        super().__init__(aux={"router_z": 0.01})
        self.one, self.other = nn.Linear(6, 1), nn.Linear(6, 1)
        with torch.no_grad():
            for parameter in (*self.one.parameters(), *self.other.parameters()):
                parameter.copy_(torch.linspace(-1.0, 1.0, parameter.numel()).view_as(parameter))

    @staticmethod
    def side(part: nn.Linear) -> Tensor:
        return part(torch.ones(2, 6)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.side(self.other if batch_idx % 2 else self.one)


class AtOnce(InTurns):
    """The same for one process without micro-batches."""

    def loss(self, ids: Tensor) -> Tensor:
        return super().loss(ids) + (self.side(self.one) + self.side(self.other)) / 2


def weights_of_an_earlier_micro_batch_alone() -> None:
    """They have a gradient, wherever it waits for the last micro-batch."""
    expected = one_process(AtOnce(), DATA)
    native = unused_gradients.NATIVE
    for by_torch in {native, False}:
        unused_gradients.NATIVE = by_torch
        try:
            for layout in (
                {"expert_parallel_size": 1, "replicas": 2, "zero_stage": 3},
                {"expert_parallel_size": 1, "replicas": 2, "zero_stage": 2},
                *LAYOUTS,
            ):
                got = fit(InTurns(), ExpertParallelStrategy(**layout), DATA, micro=2)
                close({**got, "losses": expected["losses"]}, expected)  # the step's own, without the side
        finally:
            unused_gradients.NATIVE = native


def an_expert_with_all_tokens() -> None:
    options: dict[str, Any] = {"aux": {}, "router": AllToOne}
    expected = one_process(SmallLM("sgd", **options), DATA)
    for layout in LAYOUTS:
        close(fit(SmallLM("sgd", **options), ExpertParallelStrategy(**layout), DATA), expected)


def uneven_batches() -> None:
    """Three sentences here, five there, of unequal lengths."""
    data = padded(DATA.clone())
    options: dict[str, Any] = {"aux": {"load_balance": 0.1}, "by_tokens": True}
    expected = one_process(SmallLM(**options), data)
    for layout in LAYOUTS[:2]:
        rows = Rows(data, [[0, 1, 2], [3, 4, 5, 6, 7]])
        got = fit(SmallLM(**options), ExpertParallelStrategy(**layout), rows, use_distributed_sampler=False)
        close(got, expected)


def two_levels() -> None:
    """The two-level all-to-all needs a group of more than one node: see test_exchange for four ranks."""
    expected = one_process(SmallLM("sgd"), DATA)
    strategy = ExpertParallelStrategy(2, plan=ShardingPlan(node_size=2))
    close(fit(SmallLM("sgd"), strategy, DATA), expected)


class NaNOnce(SmallLM):
    """In its second step, on rank 1 alone, the loss is not a number."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx == 1 and dist.get_rank() == 1 else loss


def a_gradient_that_is_not_finite() -> None:
    """All ranks raise, or all skip, though one alone has it."""
    for layout in LAYOUTS[:2]:
        with pytest.raises(FloatingPointError, match="nan in step 1, on all ranks"):
            fit(NaNOnce("sgd"), ExpertParallelStrategy(**layout), DATA)
        strategy = ExpertParallelStrategy(**layout, nonfinite_gradients="skip")
        module = NaNOnce("sgd")
        got = fit(module, strategy, DATA)
        assert strategy.skipped_steps == 1
        data = torch.cat([DATA[:GLOBAL_BATCH], DATA[2 * GLOBAL_BATCH :]])
        expected = one_process(SmallLM("sgd"), data)
        kept = {
            "losses": [v for n, v in enumerate(got["losses"]) if n != 1],
            "norms": [v for n, v in enumerate(got["norms"]) if n != 1],
            "weights": got["weights"],
        }
        close(kept, expected)
        watch = NonFinite("skip")
        again = fit(NaNOnce("sgd"), ExpertParallelStrategy(**layout), DATA, callbacks=[watch])
        assert watch.skipped == 1
        close({**kept, "weights": again["weights"]}, expected)
        with pytest.raises(NonFiniteError, match=r"step 2 is not .*: terms of the loss: loss; grad"):
            fit(NaNOnce("sgd"), ExpertParallelStrategy(**layout), DATA, callbacks=[NonFinite()])


def clipping_by_value() -> None:
    module, data = SmallLM("sgd"), DATA
    optimizer = module.configure_optimizers()
    for ids in data.split(GLOBAL_BATCH):
        optimizer.zero_grad()
        module.loss(ids).backward()
        nn.utils.clip_grad_value_(module.parameters(), 0.02)
        optimizer.step()
    for layout in LAYOUTS:
        other = SmallLM("sgd")
        fit(other, ExpertParallelStrategy(**layout), data, gradient_clip_val=0.02, gradient_clip_algorithm="value")
        for name, value in whole_weights(other).items():
            torch.testing.assert_close(value, module.get_parameter(name), rtol=1e-5, atol=1e-6)


class Manual(SmallLM):
    """Steps by hand."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
        optimizer.step()


def manual_optimization() -> None:
    expected = one_process(SmallLM(), DATA)
    for layout in LAYOUTS:
        module = Manual()
        fit(module, ExpertParallelStrategy(**layout), DATA, gradient_clip_val=None)
        for name, value in whole_weights(module).items():
            torch.testing.assert_close(value, expected["weights"][name], rtol=1e-5, atol=1e-6, msg=name)


class Answers(SmallLM):
    """Also tests and predicts, and calls itself."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.logits(self.model.decode(ids).hidden)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.0 * self(batch).sum()

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)


def other_loops() -> None:
    """Fit with a forward inside the step, then test, predict and fit on, all with one module.

    Without the balance loss, which in evaluation is each rank's own.
    """
    data, z_loss = DATA, {"router_z": 0.01}
    expected = one_process(SmallLM("sgd", aux=z_loss), data)
    plain = SmallLM("sgd", aux=z_loss)
    plain.load_state_dict(expected["weights"])
    for layout in LAYOUTS:
        module = Answers("sgd", aux=z_loss)
        close(fit(module, ExpertParallelStrategy(**layout), data), expected)
        trainer = trainer_for(ExpertParallelStrategy(**layout))
        loader = torch.utils.data.DataLoader(data[:GLOBAL_BATCH], batch_size=4)  # type: ignore[arg-type]
        found = trainer.test(module, loader, verbose=False)[0]["test"]
        assert found == pytest.approx(float(plain.loss(data[:GLOBAL_BATCH]).detach()), rel=1e-5)
        trainer = trainer_for(ExpertParallelStrategy(**layout), use_distributed_sampler=False)
        answers = trainer.predict(module, loader)
        assert answers is not None
        torch.testing.assert_close(
            torch.cat(answers), Answers.forward(plain, data[:GLOBAL_BATCH]), rtol=1e-4, atol=1e-5
        )  # type: ignore[arg-type]
        assert answers[0].shape[-1] == VOCABULARY
        fit(module, ExpertParallelStrategy(**layout), data)


def sharding_in_configure_model() -> None:
    """A module may divide a part of itself over the mesh it is given."""
    from torch.distributed.fsdp import fully_shard

    class Own(SmallLM):
        def configure_model(self) -> None:
            assert self.device_mesh is not None
            block = self.model.decoder.blocks[0]
            if not hasattr(block, "unshard"):
                fully_shard(block, mesh=self.device_mesh["data_parallel"])

    close(fit(Own(), ExpertParallelStrategy(2), DATA), one_process(SmallLM(), DATA))


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    accumulation,
    accumulation_is_silent,
    recomputation,
    a_rank_without_tokens,
    weights_that_a_rank_does_not_use,
    weights_that_no_rank_uses,
    weights_of_an_earlier_micro_batch_alone,
    an_expert_with_all_tokens,
    uneven_batches,
    two_levels,
    a_gradient_that_is_not_finite,
    clipping_by_value,
    manual_optimization,
    other_loops,
    sharding_in_configure_model,
)


def compiled_blocks() -> None:
    """Compiled layers (by any backend; here the one that only traces) inside experts over ranks and ZeRO."""
    expected = one_process(SmallLM("sgd"), DATA)
    for layout in LAYOUTS[::2]:
        module = SmallLM("sgd")
        for block in module.model.decoder.blocks:
            block.compile(backend="eager")
        close(fit(module, ExpertParallelStrategy(**layout), DATA), expected)


@pytest.mark.slow
def test_compiled_blocks() -> None:
    run_distributed(compiled_blocks, 2, timeout=300.0)
