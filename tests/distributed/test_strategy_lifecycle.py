"""How a run under the Strategy begins, waits and goes on: timeouts, notebooks, blocks that return views."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.connectors import accelerator_connector
from small_lm import CLIP, SmallLM, alike, one_process, quiet, sentences, trainer_for, whole_weights
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from moekit import ExpertParallelStrategy
from moekit.dispatch import TwoLevelAllToAll
from moekit.layer import moe_layers
from moekit.parallel import ShardingPlan
from moekit.testing import run_distributed, seeded

# -- timeouts ----------------------------------------------------------------------------------------------------------


def seconds_of(group: Any) -> float:
    return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def every_group_waits(seconds: float) -> list[float]:
    """What every group of a run waits; then an all-to-all in a group of two waits in vain."""
    strategy = ExpertParallelStrategy(2, plan=ShardingPlan(node_size=1), timeout=timedelta(seconds=seconds))
    trainer = trainer_for(strategy)
    waited: list[float] = []

    class Look(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            meshes = strategy.meshes
            for mesh in (meshes.dense, meshes.sparse, meshes.data, strategy._world.all):  # type: ignore[union-attr]
                waited.extend(seconds_of(group) for group in mesh.get_all_groups())
            waited.append(seconds_of(strategy._sync.lockstep._group))  # type: ignore[union-attr]
            waited.append(seconds_of(strategy._checkpoints.checkpointer._own_group()))
            group = meshes.expert_group
            assert group.size() == 2
            if group.rank() == 0:
                begun = time.monotonic()
                with pytest.raises(RuntimeError, match="Timed out"):
                    wait_tensor(all_to_all_single_autograd(torch.ones(4), None, None, group))
                assert time.monotonic() - begun < 2 * seconds
            dist.barrier()
            trainer.should_stop = True

    trainer.callbacks.append(Look())  # type: ignore[attr-defined]
    trainer.fit(SmallLM("sgd"), torch.utils.data.DataLoader(sentences(1), batch_size=2), ckpt_path=None)  # type: ignore[arg-type]
    return waited


def times_of_two_levels(seconds: float) -> list[float]:
    strategy = ExpertParallelStrategy(4, plan=ShardingPlan(node_size=2), timeout=timedelta(seconds=seconds))
    module = SmallLM("sgd")
    trainer_for(strategy, max_steps=1).fit(module, torch.utils.data.DataLoader(sentences(1), batch_size=2))  # type: ignore[arg-type]
    found = []
    for _, layer in moe_layers(module):
        exchange = layer._packed.exchange
        assert isinstance(exchange, TwoLevelAllToAll)
        found += [seconds_of(exchange.inner.group), seconds_of(exchange.outer.group)]
    return found


def both(seconds: float) -> list[float]:
    with quiet():
        return times_of_two_levels(seconds) + every_group_waits(seconds)


@pytest.mark.slow
def test_the_timeout_reaches_every_group() -> None:
    for waited in run_distributed(both, 4, 3.0, timeout=100.0):
        assert len(waited) > 10
        assert set(waited) == {3.0}


# -- notebooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_a_notebook_names_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing may start processes, one device trains in this one; two devices are refused by Lightning."""
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning sets them; put them back afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    options: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": CLIP,
        "use_distributed_sampler": False,  # Lightning's shuffles
    }  # fmt: skip
    with pytest.raises(Exception, match="not compatible with an interactive"):
        L.Trainer(strategy="expert_parallel", devices=2, **options)
    data = sentences(2)
    try:
        for _ in range(2):  # a cell is run again
            module = SmallLM("sgd")
            trainer = L.Trainer(strategy="expert_parallel", devices=1, limit_val_batches=0, **options)
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))  # type: ignore[arg-type]
            expected = one_process(SmallLM("sgd"), data)["weights"]
            for name, value in whole_weights(module).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    finally:
        dist.destroy_process_group()


# -- steps without a loss ----------------------------------------------------------------------------------------------


class SomeNothing(SmallLM):
    """Returns no loss for some batches, though it went forward."""

    def __init__(self, nothing: set[int]) -> None:
        super().__init__("sgd", aux={"router_z": 0.01})
        self.nothing = nothing

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.nothing else loss


@pytest.mark.parametrize("nothing", [{1}, {0}, {0, 1, 3}], ids=str)
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_steps_without_a_loss_in_one_process(nothing: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Among micro-batches too, all is as by plain Lightning: losses of all batches, and weights at the end."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning sets them; put them back afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }  # fmt: skip
    loader: Any = torch.utils.data.DataLoader(sentences(2), batch_size=2)  # type: ignore[arg-type]
    try:
        for micro in (2, 1):
            plain = SomeNothing(nothing)
            L.Trainer(accumulate_grad_batches=micro, **options).fit(plain, loader)
            for stage in (0, 1, 2, 3):
                module = SomeNothing(nothing)
                strategy = ExpertParallelStrategy(zero_stage=stage)  # type: ignore[arg-type]
                L.Trainer(strategy=strategy, accumulate_grad_batches=micro, **options).fit(module, loader)
                torch.testing.assert_close(torch.stack(module.losses), torch.stack(plain.losses))
                alike(module, {name: value.detach() for name, value in plain.named_parameters()})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# -- blocks that return views ------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """Works on flat tokens, as many layers do, and returns a view."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.w_out(self.w_in(x.flatten(0, 1)).tanh()).view(x.shape)}


class Residual(L.LightningModule):
    """Adds to what its blocks return in place."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(3):
            self.blocks = nn.ModuleList([Flat(), Flat(), Flat()])

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = batch
        for block in self.blocks:
            hidden = block(x)["hidden"]
            hidden += x
            x = hidden
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def writing_to_what_a_block_returned() -> None:
    data = torch.randn(8, 3, 8, generator=torch.Generator().manual_seed(0))
    plain = Residual()
    optimizer: Any = plain.configure_optimizers()
    for batch in data.split(4):
        optimizer.zero_grad()
        plain.training_step(batch, 0).backward()
        optimizer.step()
    mine = torch.stack([batch.chunk(2)[dist.get_rank()] for batch in data.split(4)])
    for stage in (0, 1, 2, 3):
        module = Residual()
        with warnings.catch_warnings(record=True) as warned, quiet():
            warnings.simplefilter("always")
            strategy = ExpertParallelStrategy(1, zero_stage=stage)  # type: ignore[arg-type]
            trainer = trainer_for(strategy, use_distributed_sampler=False, gradient_clip_val=None)
            trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=None))  # type: ignore[arg-type]
        assert not [w for w in warned if "view tensor" in str(w.message)]
        for name, value in whole_weights(module).items():
            torch.testing.assert_close(value, plain.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)


def test_a_block_that_returns_a_view() -> None:
    """Without copies, backward of stages 0, 1 and 3 asks for weights that nobody has gathered."""
    run_distributed(writing_to_what_a_block_returned, 2)
