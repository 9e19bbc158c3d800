"""A factor on experts' gradients: what it does under SGD and clipping, and does not do under Adam."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moekit import MoELayer, routers
from moekit.experts import GroupedMLP, ZeroComputationExperts
from moekit.training.callbacks.expert_gradients import ScaleExpertGradients
from moekit.training.optimizers import scale_expert_gradients

D, E = 6, 16
Make = Callable[[nn.Module], torch.optim.Optimizer]


def model() -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(routers.TopKRouter(D, E, 2, init_scale=1.0), GroupedMLP(E, D, 8, init_scale=1.0))


def trained(make: Make, factor: float | Callable[[int], float] | None, clip: float | None = None) -> dict[str, Tensor]:
    """Parameters after 20 steps."""
    moe = model()
    optimizer = make(moe)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x, target = torch.randn(2, 64, D, generator=generator)
        optimizer.zero_grad()
        (moe(x).hidden - target).square().sum().backward()
        if factor is not None:
            scale_expert_gradients(moe, factor)
        if clip is not None:
            nn.utils.clip_grad_norm_(moe.parameters(), clip)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in moe.named_parameters()}


def difference(make: Make, clip: float | None = None) -> dict[str, float]:
    """Largest change of each parameter by the paper's factor sqrt(E) = 4."""
    plain, scaled = trained(make, None, clip), trained(make, math.sqrt, clip)
    return {name: float((plain[name] - scaled[name]).abs().max()) for name in plain}


def adam(module: nn.Module) -> torch.optim.Optimizer:
    # A tiny epsilon: it is all that sees the factor, and the gradients of idle experts are near it otherwise.
    return torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-12, weight_decay=0.1)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-4)


def test_under_adam_it_does_nothing() -> None:
    assert max(difference(adam).values()) < 1e-6


def test_under_sgd_it_acts() -> None:
    found = difference(sgd)
    assert found["experts.w_in"] > 1e-4
    assert found["experts.w_out"] > 1e-4


def test_with_clipping_it_acts_on_all_even_under_adam() -> None:
    """The experts' larger share of the norm shrinks what the others get, unequally from step to step."""
    found = difference(adam, clip=0.5)
    assert found["router.weight"] > 1e-6


def test_which_gradients_are_multiplied_and_by_what() -> None:
    moe = nn.ModuleDict(
        {
            "small": GroupedMLP(4, D, 8, bias=True),
            "wrapped": ZeroComputationExperts(GroupedMLP(5, D, 8), zero=1, copy=1, constant=2),
            "dense": nn.Linear(D, D),
        }
    )
    moe.small.b_out.requires_grad_(False)  # type: ignore[union-attr]
    for parameter in moe.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    scale_expert_gradients(moe)
    for name, parameter in moe.named_parameters():
        expected = {"small": 2.0, "wrapped": 3.0, "dense": 1.0}[name.partition(".")[0]]
        assert parameter.grad is None or (parameter.grad == expected).all(), name
    scale_expert_gradients(moe, 10.0)
    assert (moe.small.w_in.grad == 20.0).all()  # type: ignore[union-attr]
    assert (moe.dense.weight.grad == 1.0).all()  # type: ignore[union-attr]
    only = torch.optim.SGD([moe.small.w_out], lr=1.0)  # type: ignore[union-attr]
    scale_expert_gradients(moe, 0.5, optimizer=only)
    assert (moe.small.w_out.grad == 10.0).all()  # type: ignore[union-attr]
    assert (moe.small.w_in.grad == 20.0).all()  # type: ignore[union-attr]


def test_a_factor_must_be_positive() -> None:
    moe = model()
    moe(torch.randn(5, D)).hidden.sum().backward()
    with pytest.raises(ValueError, match="positive factor: got 0"):
        scale_expert_gradients(moe, 0.0)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.moe = model()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.moe(batch).hidden.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("clip", [None, 1e-2])
def test_callback_acts_once_a_step_and_before_clipping(tmp_path: Path, clip: float | None) -> None:
    """Equal to the same by hand, with two micro-batches a step."""
    data = torch.randn(4, D)
    module = Module()
    twin = copy.deepcopy(module.moe)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    for pair in (data[:2], data[2:]):
        optimizer.zero_grad()
        for row in pair:
            (twin(row[None]).hidden.square().sum() / 2).backward()
        scale_expert_gradients(twin)
        if clip is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
    L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=clip,
        callbacks=[ScaleExpertGradients()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(data))  # type: ignore[arg-type]
    for name, parameter in module.moe.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name))
