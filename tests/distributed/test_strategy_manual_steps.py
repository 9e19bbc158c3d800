"""Steps by hand under the Strategy: several optimizers, passes and backwards in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from case_group import in_one_group
from small_lm import FEW_LAYOUTS, GLOBAL_BATCH, MORE_LAYOUTS, SmallLM, alike, fit, sentences
from torch import Tensor

from moekit import ExpertParallelStrategy
from moekit.errors import UserError

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


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    one_of_two_made_before,
    several_passes_in_a_step,
    several_backwards_in_a_step,
    muon_needs_whole_matrices,
)
