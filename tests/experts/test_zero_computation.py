"""Zero, copy and constant experts: by hand, and what they cost."""

from __future__ import annotations

import pytest
import torch

from moekit import MoELayer, routers
from moekit.experts import GroupedMLP, ZeroComputationExperts
from moekit.functional import moe_reference
from moekit.testing import assert_close, trace
from moekit.training.optimizers import parameter_groups

D = 5


def bank() -> ZeroComputationExperts:
    """Experts 0, 1: feed-forward; 2, 3: zero; 4: copy; 5, 6: constant."""
    return ZeroComputationExperts(GroupedMLP(2, D, 7, init_scale=1.0), zero=2, copy=1, constant=2)


def test_each_kind_by_hand() -> None:
    experts, rows = bank(), torch.randn(9, D)
    counts = torch.tensor([2, 0, 1, 1, 2, 1, 2])
    out = experts(rows, counts)
    assert_close(out[:2], experts.experts.reference(0, rows[:2]))
    assert not out[2:4].any()
    assert torch.equal(out[4:6], rows[4:6])
    for row, j in ((6, 0), (7, 1), (8, 1)):
        a = torch.softmax(experts.mix[j].t() @ rows[row], 0)
        assert_close(out[row], a[0] * rows[row] + a[1] * experts.value[j], f"constant expert {j}")


def test_in_a_layer() -> None:
    """A router that chooses from all kinds, against the loop over assignments; gradients reach the constants."""
    experts = bank().double()
    layer = MoELayer(routers.TopKRouter(D, 7, 2, init_scale=1.0), experts).double()
    x = torch.randn(40, D, dtype=torch.float64)
    routing = layer(x).routing
    assert set(routing.expert.tolist()) == set(range(7))
    assert_close(layer(x).hidden, moe_reference(x, routing, experts.reference))
    found = trace(layer, layer, x)
    assert found["gradient of experts.value"].any()
    assert found["gradient of experts.mix"].any()


def test_only_the_bank_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of zero and copy experts do not enter the feed-forward experts."""
    experts, seen = bank(), []
    forward = GroupedMLP.forward
    monkeypatch.setattr(
        GroupedMLP, "forward", lambda self, rows, counts=None: seen.append(len(rows)) or forward(self, rows, counts)
    )
    experts(torch.randn(9, D), torch.tensor([2, 1, 0, 2, 4, 0, 0]))
    assert seen == [3]


def test_what_it_is_to_others() -> None:
    experts = bank()
    assert experts.num_experts == 7
    assert experts.requires_whole_bank
    assert MoELayer(routers.switch(D, 7), experts).requires_whole_bank
    assert not MoELayer(routers.switch(D, 2), GroupedMLP(2, D, 7)).requires_whole_bank
    groups = {group["name"]: len(group["params"]) for group in parameter_groups(experts, lr=1.0)}
    assert groups == {"expert": 3, "expert_no_decay": 1}  # the constant vectors do not decay


@pytest.mark.parametrize("numbers", [{"zero": -1}, {"zero": 0, "copy": 0, "constant": 0}])
def test_senseless_numbers(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="not negative, and at least one: got zero="):
        ZeroComputationExperts(GroupedMLP(2, D, 7), **numbers)
