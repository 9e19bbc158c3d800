"""Residual stacks: how they start, gradcheck, and that no block costs a whole gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from moekit.experts import BASELayerStack

E, D, F = 3, 4, 5


@pytest.mark.parametrize("counts", [None, [3, 0, 2]])
def test_gradcheck(counts: list[int] | None) -> None:
    torch.manual_seed(0)
    bank = BASELayerStack(E, D, F, num_layers=2, activation="gelu", output_scale=1.0).double()
    rows = torch.randn((E, 2, D) if counts is None else (5, D), dtype=torch.float64, requires_grad=True)
    given = None if counts is None else torch.tensor(counts)
    names = [name for name, _ in bank.named_parameters()]

    def added(rows: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(bank, dict(zip(names, parameters, strict=True)), (rows, given))

    leaves = tuple(p.detach().clone().requires_grad_() for p in bank.parameters())
    assert torch.autograd.gradcheck(added, (rows, *leaves))


def test_start() -> None:
    torch.manual_seed(0)
    bank = BASELayerStack(2, 32, 128, num_layers=2)
    assert not bank.w_out.any()
    assert bank.b_in is not None
    assert bank.b_out is not None
    assert not bank.b_in.any()
    assert not bank.b_out.any()
    # Near the variance 1 / (3 fan_in) of nn.Linear; cutting the normal at two deviations takes about a fifth.
    assert float(bank.w_in.detach().var()) == pytest.approx(0.774 / 3 / 32, rel=0.05)
    plain = BASELayerStack(2, 32, 128, bias=False, output_scale=0.5)
    assert plain.b_in is None
    assert plain.b_out is None
    assert float(plain.w_out.detach().var()) == pytest.approx(0.774 * 0.5 / 128, rel=0.05)


def test_local_experts_alone() -> None:
    """A rank that holds some of the experts computes them as the whole bank does."""
    torch.manual_seed(0)
    whole, part = (BASELayerStack(n, D, F, num_layers=2, output_scale=1.0) for n in (4, 4))
    part.load_state_dict(whole.state_dict())
    for name, parameter in list(part.named_parameters()):
        setattr(part, name, torch.nn.Parameter(parameter[2:].detach().clone()))
    rows = torch.randn(5, D)
    together = whole(torch.cat([torch.randn(3, D), rows]), torch.tensor([1, 2, 3, 2]))
    assert torch.equal(part(rows, torch.tensor([3, 2])), together[3:])


def test_needs_a_block() -> None:
    with pytest.raises(ValueError, match="num_layers=0"):
        BASELayerStack(2, 4, 8, num_layers=0)
