"""Steps by hand under the Strategy: several optimizers, passes and backwards in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from case_group import in_one_group
from small_lm import (
    DIM,
    EXPERTS,
    FEW_LAYOUTS,
    GLOBAL_BATCH,
    MORE_LAYOUTS,
    SmallLM,
    alike,
    fit,
    sentences,
    trainer_for,
)
from torch import Tensor, nn

import moekit as mk
from moekit import ExpertParallelStrategy
from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.routers import TopKRouter
from moekit.testing import seeded

DATA = sentences(3)


class OneOfTwo(SmallLM):
    """Steps by hand with two optimizers, of which one was there before."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.optim.SGD([p for n, p in self.named_parameters() if "experts" in n], lr=0.1)

    def configure_optimizers(self) -> Any:
        return [self.first, torch.optim.AdamW([p for n, p in self.named_parameters() if "experts" not in n], lr=1e-2)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()


def one_of_two_made_before() -> None:
    plain = OneOfTwo()
    optimizers = plain.configure_optimizers()
    for ids in DATA.split(GLOBAL_BATCH):
        plain.loss(ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for layout in FEW_LAYOUTS:
        module = OneOfTwo()
        fit(module, ExpertParallelStrategy(**layout), DATA, gradient_clip_val=None)
        alike(module, plain)


class SeveralPasses(SmallLM):
    """Goes forward and backward once for each of two optimizers, as adversarial training does, and looks between."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        experts = [p for n, p in self.named_parameters() if "experts" in n]
        others = [p for n, p in self.named_parameters() if "experts" not in n]
        return [torch.optim.SGD(experts, lr=0.1), torch.optim.AdamW(others, lr=1e-2)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            self.losses.append(loss.detach())
            self.manual_backward(loss)
            with torch.no_grad():
                self.loss(batch)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


def several_passes_in_a_step() -> None:
    """What a backward let go of is gathered again, with the weights of after the step, and toggled as they are."""
    plain = SeveralPasses()
    optimizers = plain.configure_optimizers()
    losses = []
    for ids in DATA.split(GLOBAL_BATCH):
        for optimizer in optimizers:
            plain.zero_grad()
            loss = plain.loss(ids)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
    for layout in MORE_LAYOUTS:
        module = SeveralPasses()
        found = fit(module, ExpertParallelStrategy(**layout), DATA, gradient_clip_val=None)
        assert found["losses"] == pytest.approx(losses, rel=1e-5), layout
        alike(module, plain)


class TwoLosses(SmallLM):
    """Two graphs stand before the first backward, one of which goes backward twice."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        one, other = self.loss(batch), self.loss(batch.flip(1))
        self.losses.append(one.detach())
        self.manual_backward(one, retain_graph=True)
        self.manual_backward(other)
        self.manual_backward(one.square())
        optimizer.step()
        optimizer.zero_grad()


def several_backwards_in_a_step() -> None:
    """Every backward has the weights that its forward had."""
    plain = TwoLosses()
    optimizer = plain.configure_optimizers()
    for ids in DATA.split(GLOBAL_BATCH // 2):  # a square of a mean is none of means: ranks take turns, not parts
        one, other = plain.loss(ids), plain.loss(ids.flip(1))
        (one + one.square() + other).backward()
        optimizer.step()
        optimizer.zero_grad()
    for layout in MORE_LAYOUTS:
        module = TwoLosses()
        ids = DATA.view(-1, GLOBAL_BATCH // 2, DATA.shape[1])
        both = ids.repeat_interleave(2, 1)  # the sampler deals rows out in turn, so both ranks read the same
        fit(module, ExpertParallelStrategy(**layout), both.flatten(0, 1), gradient_clip_val=None)
        alike(module, plain)


class ByMuon(SmallLM):
    """Matrices by Muon, all else by AdamW, by hand."""

    automatic_optimization = False
    training_step = OneOfTwo.training_step  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        # What has two dimensions in a bank is a vector for each expert.
        matrices = [p for n, p in self.named_parameters() if p.ndim == 2 and "experts" not in n]
        others = [p for n, p in self.named_parameters() if p.ndim != 2 or "experts" in n]
        return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]


def muon_needs_whole_matrices() -> None:
    plain = ByMuon()
    optimizers = plain.configure_optimizers()
    for ids in DATA.split(GLOBAL_BATCH):
        plain.loss(ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for layout in MORE_LAYOUTS:
        if layout["zero_stage"] == 0:
            module = ByMuon()
            fit(module, ExpertParallelStrategy(**layout), DATA, gradient_clip_val=None)
            alike(module, plain)
        else:
            with pytest.raises(UserError, match=r"Muon must see whole matrices: .*zero_stage=0"):
                fit(ByMuon(), ExpertParallelStrategy(**layout), DATA, gradient_clip_val=None)


class Adversarial(L.LightningModule):
    """A generator and a discriminator of plain layers, beside which there is no unit but the model itself.

    Args:
        sparse: Whether the generator is a sparse layer, whose bank is a unit that only one of the losses meets.
        toggles: Whether only the weights of the optimizer that is about to step get gradients.
    """

    automatic_optimization = False

    def __init__(self, *, sparse: bool, toggles: bool) -> None:
        super().__init__()
        self.toggles = toggles
        with seeded(5):
            experts = mk.MoELayer(TopKRouter(DIM, EXPERTS, 1), GroupedMLP(EXPERTS, DIM, 8))
            self.generator = experts if sparse else nn.Linear(DIM, DIM)
            self.discriminator = nn.Sequential(nn.Linear(DIM, 8), nn.SiLU(), nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.discriminator)]

    def generated(self, batch: Tensor) -> Tensor:
        found = self.generator(batch)
        return found.hidden if isinstance(found, mk.MoEOutput) else found

    def judged(self, batch: Tensor) -> Tensor:
        return self.discriminator(batch).square().mean()

    def step(self, optimizer: Any, loss: Callable[[], Tensor]) -> None:
        if self.toggles:
            self.toggle_optimizer(optimizer)
        else:
            optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()
        if self.toggles:  # the other's weights got no gradients, so that nobody has to take them away
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        one, other = optimizers
        self.step(one, lambda: self.judged(self.generated(batch)))
        self.step(other, lambda: self.judged(self.generated(batch).detach()) - self.judged(batch))


def backwards_that_meet_no_inner_unit() -> None:
    """The weights of the model itself get their gradients in every backward of a step: as by plain Lightning."""
    data = torch.randn(3, GLOBAL_BATCH, DIM, generator=torch.Generator().manual_seed(1))
    mine = torch.stack([batch.chunk(2)[dist.get_rank()] for batch in data])
    for sparse, toggles in ((False, True), (False, False), (True, False), (True, True)):
        plain = Adversarial(sparse=sparse, toggles=toggles)
        options: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False,
        }  # fmt: skip
        L.Trainer(**options).fit(plain, torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]
        for layout in ({"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}):
            module = Adversarial(sparse=sparse, toggles=toggles)
            strategy = ExpertParallelStrategy(**layout)  # type: ignore[arg-type]
            trainer = trainer_for(strategy, use_distributed_sampler=False, gradient_clip_val=None)
            trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=None))  # type: ignore[arg-type]
            alike(module, plain)


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    one_of_two_made_before,
    several_passes_in_a_step,
    several_backwards_in_a_step,
    backwards_that_meet_no_inner_unit,
    muon_needs_whole_matrices,
)
