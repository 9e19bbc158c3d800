"""MoELayer and AuxLosses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moekit as mk
from moekit import routers
from moekit.dispatch import Dispatched, PackedDispatcher, PaddedDispatcher
from moekit.experts import GroupedMLP
from moekit.functional import moe_reference
from moekit.layer import AuxLosses, MoELayer, MoEOutput
from moekit.mixing import SoftmaxMix
from moekit.routing import Capacity, Routing, RoutingContext
from moekit.testing import assert_close, assert_same, trace
from moekit.transformer import MLP

D, E = 6, 4


def layer(**options: Any) -> MoELayer:
    return MoELayer(
        routers.TopKRouter(D, E, 2, init_scale=1.0, capacity=Capacity(train=1.0)),
        GroupedMLP(E, D, 8, init_scale=1.0),
        **options,
    )


def test_numbers_of_experts_must_agree() -> None:
    with pytest.raises(ValueError, match="the router chooses from 4, the bank has 3"):
        MoELayer(routers.switch(D, 4), GroupedMLP(3, D, 8))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"experts": GroupedMLP(E, D + 2, 8)}, "the router and the experts .* router has dim 6, the experts 8"),
        ({"shared": nn.Linear(D + 1, D)}, "router and the shared branch .* has dim 6, the shared branch 7"),
        ({"shared": MLP(D - 1, 8)}, "router and the shared branch .* has dim 6, the shared branch 5"),
        ({"shared": nn.Sequential(nn.Dropout(), nn.Linear(3, D))}, "dim 6, the shared branch 3"),
        ({"shared": MLP(D, 8), "mix": SoftmaxMix(4)}, "router and the mix .* has dim 6, the mix 4"),
        ({"router": routers.hash_random(E, 50), "shared": MLP(5, 8)}, "experts has dim 6, the shared branch 5"),
        ({"router": routers.noisy_topk(9, E, k=2)}, "router has dim 9, the experts 6"),
        ({"router": routers.HierarchicalRouter(9, 2, 2)}, "router has dim 9, the experts 6"),
        ({"router": routers.base_layers(9, E)}, "router has dim 9, the experts 6"),
    ],
)
def test_widths_must_agree(parts: dict[str, Any], words: str) -> None:
    """A part of another width would fail in its first product, in torch's words."""
    fitting = {"router": routers.switch(D, E), "experts": GroupedMLP(E, D, 8)}
    with pytest.raises(ValueError, match=words):
        MoELayer(**{**fitting, **parts})


def test_a_part_that_says_no_width_is_taken() -> None:
    assert MoELayer(routers.switch(D, E), GroupedMLP(E, D, 8), shared=nn.Identity()).num_experts == E


@pytest.mark.parametrize("shape", [(D,), (7, D), (2, 5, D), (2, 3, 2, D), (0, D), (2, 0, D)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    """Tokens are the leading axes, flattened in order; the output has the shape of the input."""
    moe = layer().eval()
    x = torch.randn(shape)
    mask = torch.rand(shape[:-1]) < 0.7
    hidden, routing = moe(x, RoutingContext(mask=mask))
    assert hidden.shape == shape
    assert routing.num_tokens == x[..., 0].numel()
    flat = moe(x.reshape(-1, D), RoutingContext(mask=mask.reshape(-1))).hidden
    assert torch.equal(hidden.reshape(-1, D), flat)
    assert not hidden[~mask].any()


def test_context_must_fit() -> None:
    with pytest.raises(ValueError, match=r"RoutingContext.mask must have one entry per token: got shape \(2, 4\)"):
        layer()(torch.randn(2, 5, D), RoutingContext(mask=torch.ones(2, 4, dtype=torch.bool)))


def test_non_contiguous_input() -> None:
    moe = layer().eval()
    x = torch.randn(5, 3, D).transpose(0, 1)
    assert_close(moe(x).hidden, moe(x.contiguous()).hidden)


def test_shared_branch_is_added_for_every_token() -> None:
    """Also for padding and dropped tokens, which get nothing else."""
    shared = nn.Linear(D, D)
    moe, x = layer(shared=shared).eval(), torch.randn(2, 5, D)
    bare = MoELayer(moe.router, moe.experts).eval()
    context = RoutingContext(mask=torch.tensor([[True] * 5, [False] * 5]))
    hidden = moe(x, context).hidden
    assert_close(hidden, bare(x, context).hidden + shared(x))
    assert_close(hidden[1], shared(x[1]))
    assert any(name.startswith("shared.") for name, _ in moe.named_parameters())


def test_no_residual() -> None:
    moe = layer().eval()
    x = torch.randn(9, D)
    routing = moe.router(x)
    assert_close(moe(x).hidden, moe_reference(x, routing, moe.experts.reference))


class Recording(PackedDispatcher):
    """Remembers that it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        self.asked += 1
        return super().dispatch(x, routing)

    def __len__(self) -> int:
        return 0  # falsy, and still the one to use


def test_the_given_dispatcher_is_used() -> None:
    dispatcher = Recording()
    moe = layer(dispatcher=dispatcher)
    moe.train()(torch.randn(9, D))
    moe.eval()(torch.randn(9, D))
    assert dispatcher.asked == 2


def test_the_default_dispatcher_follows_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded where the routing has a capacity, packed where it is dropless, and always packed on a CPU."""
    used: list[str] = []
    for cls in (PackedDispatcher, PaddedDispatcher):
        original = cls.dispatch

        def dispatch(self: Any, x: Tensor, routing: Routing, _original: Any = original) -> Dispatched:
            used.append(type(self).__name__)
            return _original(self, x, routing)

        monkeypatch.setattr(cls, "dispatch", dispatch)
    for device, wanted in (("cpu", "PackedDispatcher"), ("meta", "PaddedDispatcher")):
        moe, x = layer().to(device), torch.randn(9, D, device=device)
        moe.train()(x)
        moe.eval()(x)
        assert used == [wanted, "PackedDispatcher"]
        used.clear()


def test_output_unpacks() -> None:
    out = layer()(torch.randn(9, D))
    hidden, routing = out
    assert isinstance(out, MoEOutput)
    assert hidden is out.hidden
    assert routing is out.routing


@pytest.mark.parametrize("training", [True, False])
def test_bf16(training: bool) -> None:
    """A bf16 layer returns bf16, with float32 weights and losses, near the same layer in float32."""
    moe = layer(shared=nn.Linear(D, D)).bfloat16().train(training)
    x = torch.randn(30, D).bfloat16()
    hidden, routing = moe(x)
    assert hidden.dtype == torch.bfloat16
    assert {routing.weight.dtype, *(loss.dtype for loss in routing.losses.values())} == {torch.float32}
    assert_close(hidden, moe.float()(x.float()).hidden)
    with torch.autocast("cpu", torch.bfloat16):
        cast = moe(x.float()).hidden
    assert cast.dtype == torch.float32
    assert_close(cast.bfloat16(), hidden)


def test_logs_nothing_and_runs_without_a_trainer() -> None:
    moe = layer()
    moe.log("anything", 1.0)
    assert moe.global_step == 0


def routing_with(**losses: float) -> Routing:
    scalars = {name: torch.tensor(value, requires_grad=True) for name, value in losses.items()}
    empty = torch.zeros(0, dtype=torch.int64)
    return Routing(empty, empty, torch.zeros(0), empty, empty.bool(), losses=scalars)


def test_aux_losses_sum_and_mean() -> None:
    routings = [routing_with(load_balance=1.0, router_z=10.0), routing_with(load_balance=2.0, router_z=30.0)]
    total, terms = AuxLosses(load_balance=0.1, router_z=0.01)(*routings)
    assert float(total.detach()) == pytest.approx(0.1 * 3 + 0.01 * 40)
    assert {name: float(value) for name, value in terms.items()} == {"load_balance": 1.5, "router_z": 20.0}
    mean, same = AuxLosses(layers="mean", load_balance=0.1, router_z=0.01)(*routings)
    assert float(mean.detach()) == pytest.approx(0.1 * 1.5 + 0.01 * 20)
    assert {name: float(value) for name, value in same.items()} == {"load_balance": 1.5, "router_z": 20.0}


def test_aux_losses_carry_the_gradient_and_terms_do_not() -> None:
    routing = routing_with(load_balance=1.0, router_z=10.0)
    total, terms = AuxLosses(load_balance=0.25)(routing)
    total.backward()
    assert float(routing.losses["load_balance"].grad) == 0.25  # type: ignore[arg-type]
    assert routing.losses["router_z"].grad is None  # a loss without a weight does not count
    assert set(terms) == {"load_balance"}
    assert not terms["load_balance"].requires_grad


def test_aux_losses_over_layers_that_differ() -> None:
    """A loss that only some layers have is summed, and averaged, over those."""
    routings = [routing_with(load_balance=1.0), routing_with(load_balance=3.0, router_z=5.0)]
    total, terms = AuxLosses(load_balance=1.0, router_z=1.0, layers="mean")(*routings)
    assert float(total.detach()) == 2.0 + 5.0
    assert float(terms["router_z"]) == 5.0


def test_aux_losses_name_the_nearest() -> None:
    routing = routing_with(load_balance=1.0, router_z=1.0)
    with pytest.raises(ValueError, match=r"weighs 'load_balanse'.*mean 'load_balance'.*load_balance, router_z"):
        AuxLosses(load_balanse=1.0)(routing)
    with pytest.raises(ValueError, match=r"weighs 'importance', but no router returned .* There are: none\.$"):
        AuxLosses(importance=1.0)(routing_with())
    with pytest.raises(TypeError, match=r"one by one, as in aux\(\*output.routings\): got a list\.$"):
        AuxLosses(load_balance=0.01)([])  # type: ignore[arg-type]


def test_aux_losses_refuse() -> None:
    with pytest.raises(ValueError, match='layers must be "sum" or "mean": got \'max\''):
        AuxLosses(layers="max")  # type: ignore[arg-type]


def test_aux_losses_of_a_dense_model() -> None:
    """No sparse layer: nothing to add, and no error, so that a dense twin runs the same code."""
    total, terms = AuxLosses(load_balance=1e-2)()
    assert float(total) == 0.0
    assert terms == {}


def test_aux_losses_print() -> None:
    assert repr(AuxLosses(load_balance=1e-2, router_z=1e-3)) == (
        "AuxLosses(load_balance=0.01, router_z=0.001, layers='sum')"
    )


class Largest(TorchDispatchMode):
    """Notes the most bytes that one operation made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return made


@pytest.mark.parametrize("padding", [False, True])
def test_a_capacity_without_a_limit_takes_no_more_than_the_tokens(padding: bool) -> None:
    """All tokens at one of 64 experts: 64 slots for each token, of which rows of tokens are a 64th."""
    tokens, dim, num_experts = 512, 16, 64
    router = mk.routers.switch(dim, num_experts, jitter=0.0, capacity_factor=64.0)
    layer = mk.MoELayer(router, mk.experts.GroupedMLP(num_experts, dim, 32, bias=True))
    slow = mk.MoELayer(router, layer.experts, mk.PaddedDispatcher())
    with torch.no_grad():
        (scores,) = router.parameters()
        scores.zero_()[:, 0] = 1.0
    x = torch.rand(tokens, dim)
    context = mk.RoutingContext(mask=torch.arange(tokens) % 3 > 0) if padding else None
    assert router(x, context).capacity == tokens
    assert_same(
        trace(lambda x: layer(x, context), layer, x), trace(lambda x: slow(x, context), slow, x), "packed instead"
    )
    with torch.no_grad(), Largest() as packed:
        _, routing = layer(x, context)
    with torch.no_grad(), Largest() as padded:
        slow(x, context)
    assert padded.bytes == num_experts * tokens * 32 * 4
    assert packed.bytes <= tokens * num_experts * 4  # scores of all experts, or rows of twice the width
    stats = mk.routing_stats(routing)
    assert stats.load.tolist() == stats.kept.tolist() == [int(routing.kept.sum())] + [0] * (num_experts - 1)


def test_slots_stay_where_they_are_not_mostly_empty() -> None:
    layer = mk.MoELayer(mk.routers.switch(4, 16, capacity_factor=8.0), mk.experts.GroupedMLP(16, 4, 5))
    x = torch.randn(1024, 4)
    elsewhere = x.to("meta")
    assert layer._packs(x, layer.router(x)), "a CPU counts for nothing"
    assert not layer._packs(elsewhere, layer.router(x))
    more = mk.MoELayer(mk.routers.switch(4, 16, capacity_factor=8.3), layer.experts)
    assert more._packs(elsewhere, more.router(x))
    assert not more._packs(elsewhere[:64], more.router(x[:64])), "so few that the host need not count"
