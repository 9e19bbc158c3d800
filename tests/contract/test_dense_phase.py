"""The dense phase goes with every router and with every bank of experts that are alike."""

from __future__ import annotations

import pytest
import torch
from test_contract import EXPERTS, ROUTERS, D

from moekit import MoELayer
from moekit.experts import DensePretraining, GroupedMLP
from moekit.testing import assert_close, seeded, some_context, some_mask

T = 12


@pytest.mark.parametrize("name", ROUTERS)
def test_with_every_router(name: str) -> None:
    """A dense feed-forward on real tokens, in training and evaluation; gradients of the router are zero."""
    with seeded(0):
        router = ROUTERS[name]()
        bank = GroupedMLP(router.num_experts, D, 6, init_scale=1.0)
    layer = MoELayer(router, bank, phase=DensePretraining(3))
    x, real = torch.randn(T, D), some_mask(T)
    context = some_context(router, T, mask=real)
    for training in (True, False):
        hidden, routing = layer.train(training)(x, context)
        assert_close(hidden[real], bank.reference(0, x[real]))
        assert not hidden[~real].any()
        (hidden.sum() + sum(routing.losses.values())).backward()  # type: ignore[no-untyped-call]
        assert not any(p.grad is not None and p.grad.any() for p in router.parameters())
        layer.zero_grad()
        dense = routing.losses.keys()
    layer.on_step_end(3)
    assert layer(x, context).routing.losses.keys() == dense, "the same losses before and after, for their weights"


@pytest.mark.parametrize("name", [name for name in EXPERTS if not name.startswith("ZeroComputation")])
def test_with_every_bank(name: str) -> None:
    """All rows by expert 0, its gradient in every copy."""
    with seeded(0):
        bank, x = EXPERTS[name]().eval(), torch.randn(T, D)
    phase = DensePretraining(3)
    phase.begin(bank)
    found = phase(bank, x)
    expected = bank.reference(0, x)
    assert_close(found, expected)
    tied = torch.autograd.grad(found.sum(), list(bank.parameters()), allow_unused=True)
    alone = torch.autograd.grad(expected.sum(), list(bank.parameters()), allow_unused=True)
    for (key, _), gradient, one in zip(bank.named_parameters(), tied, alone, strict=True):
        if one is not None and "expert" in bank.axes[key]:
            axis = bank.axes[key].index("expert")
            assert_close(gradient, one.narrow(axis, 0, 1).expand_as(one), f"gradient of {key}")
