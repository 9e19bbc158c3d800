"""BASE layers against loops written from the paper's equations, with scipy for the assignment."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.func import functional_call

from moekit import routers
from moekit.experts import BASELayerStack
from moekit.layer import MoELayer
from moekit.routers import BASELayerRouter
from moekit.routing import RoutingContext, routing_stats
from moekit.testing import assert_close, skewed_tokens, some_mask

D, E, F = 6, 4, 10


def layer(num_layers: int = 2) -> MoELayer:
    """In float64, with experts that do something from the start and centroids that differ."""
    torch.manual_seed(0)
    bank = BASELayerStack(E, D, F, num_layers=num_layers, output_scale=1.0)
    made = MoELayer(BASELayerRouter(D, E, init_gain=1.0), bank).double()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def literal_stack(bank: BASELayerStack, e: int, h: Tensor) -> Tensor:
    """f_e(h): blocks of norm, two matrices, ReLU, residual."""
    for block in range(bank.num_layers):
        normed = (h - h.mean()) / (h.var(correction=0) + bank.eps).sqrt()
        normed = normed * bank.norm_gain[e, block] + bank.norm_shift[e, block]
        hidden = (normed @ bank.w_in[e, block] + bank.b_in[e, block]).clamp_min(0)  # type: ignore[index]
        h = h + hidden @ bank.w_out[e, block] + bank.b_out[e, block]  # type: ignore[index]
    return h


def literal_layer(moe: MoELayer, x: Tensor, real: list[int], *, training: bool) -> tuple[Tensor, dict[int, int]]:
    """alpha f(h) + (1 - alpha) h, token after token; the assignment on scores without gradient."""
    router, bank = moe.router, moe.experts
    scores = torch.stack([x[t].detach() @ router.weight.detach().t() for t in real])
    if training:
        slots = scores.repeat_interleave(-(-len(real) // E), dim=1).numpy()
        rows, columns = linear_sum_assignment(slots, maximize=True)
        chosen = dict(zip([real[r] for r in rows], [int(c) // -(-len(real) // E) for c in columns], strict=True))
    else:
        chosen = {t: max(range(E), key=lambda e: float(scores[n, e])) for n, t in enumerate(real)}
    out = []
    for t in range(x.shape[0]):
        if t not in chosen:
            out.append(x[t])
            continue
        alpha = 1 / (1 + torch.exp(-(x[t] * router.weight[chosen[t]]).sum()))
        out.append(alpha * literal_stack(bank, chosen[t], x[t]) + (1 - alpha) * x[t])
    return torch.stack(out), chosen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_papers_equations(training: bool, masked: bool) -> None:
    """Decisions, output and every gradient; 24 and 32 real tokens, so that experts divide them."""
    moe = layer().train(training)
    x = skewed_tokens(32, D, dtype=torch.float64, seed=2).requires_grad_()
    mask = torch.arange(32) % 4 > 0 if masked else None
    hidden, routing = moe(x, RoutingContext(mask=mask))
    real = list(range(32)) if mask is None else mask.nonzero().flatten().tolist()
    expected, chosen = literal_layer(moe, x, real, training=training)
    assert {t: int(routing.expert[t]) for t in real} == chosen
    loads = routing_stats(routing).load.tolist()
    assert (loads == [len(real) // E] * E) == training
    assert_close(x + hidden, expected)
    leaves = [x, *moe.parameters()]
    probe = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)
    ours, theirs = (torch.autograd.grad((y * probe).sum(), leaves) for y in (x + hidden, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_starts_as_the_identity() -> None:
    """As made, the layer adds exactly nothing, and its last matrices are what learns first."""
    moe = MoELayer(routers.base_layers(D, E), BASELayerStack(E, D, F, num_layers=3))
    hidden = moe(torch.randn(12, D)).hidden
    assert not hidden.any()
    hidden.sum().backward()
    assert moe.experts.w_out.grad is not None
    assert bool((moe.experts.w_out.grad.abs().sum((1, 2, 3)) > 0).all())


@pytest.mark.parametrize(("tokens", "loads"), [(0, [0] * 4), (1, [0, 0, 0, 1]), (3, [0, 1, 1, 1]), (30, [7, 7, 8, 8])])
def test_any_number_of_tokens(tokens: int, loads: list[int]) -> None:
    router = BASELayerRouter(D, E, init_gain=1.0).train()
    routing = router(skewed_tokens(tokens, D))
    assert sorted(routing_stats(routing).load.tolist()) == loads
    assert bool(routing.kept.all())
    assert routing.capacity == -(-tokens // E)


def test_training_decides_not_requires_grad() -> None:
    """A frozen trunk trains with the balanced assignment; evaluation is greedy also where gradients are wanted."""
    router = BASELayerRouter(D, E, init_gain=1.0)
    x = skewed_tokens(32, D)
    router.train().requires_grad_(False)
    with torch.no_grad():
        assert routing_stats(router(x)).load.tolist() == [8] * 4
    router.eval().requires_grad_(True)
    routing = router(x.requires_grad_())
    assert torch.equal(routing.expert, (x @ router.weight.t()).argmax(1))
    assert routing.capacity is None
    assert routing.statistics["greedy_agreement"] == 1.0


def test_a_balanced_evaluation_assigns_as_training_does() -> None:
    """Experts, weights and capacity are those of training, with padding too; the greedy choice differs."""
    x, mask = skewed_tokens(32, D), torch.arange(32) % 4 > 0
    router = BASELayerRouter(D, E, init_gain=1.0, eval_assignment="balanced")
    for context in (None, RoutingContext(mask=mask)):
        trained, evaluated = router.train()(x, context), router.eval()(x, context)
        assert torch.equal(evaluated.expert, trained.expert)
        assert torch.equal(evaluated.weight, trained.weight)
        assert torch.equal(evaluated.kept, trained.kept)
        assert evaluated.capacity == trained.capacity
        assert len(set(routing_stats(evaluated).load.tolist())) == 1
        assert evaluated.statistics["greedy_agreement"] < 1
    moe = layer()
    hidden = moe.train()(x.double()).hidden
    moe.router.eval_assignment = "balanced"
    assert_close(moe.eval()(x.double()).hidden, hidden)


def test_evaluation_does_not_look_ahead_and_training_does() -> None:
    router = BASELayerRouter(D, E, init_gain=1.0)
    x = skewed_tokens(32, D)
    other = torch.cat([x[:16], -x[16:]])
    assert torch.equal(router.eval()(x).expert[:16], router(other).expert[:16])
    assert not torch.equal(router.train()(x).expert[:16], router(other).expert[:16])
    with pytest.raises(ValueError, match="depend on later tokens"):
        router.check_causal()
    routers.base_layers(D, E, allow_future=True).check_causal()


def test_padding_takes_no_part() -> None:
    router = BASELayerRouter(D, E, init_gain=1.0).train()
    x, mask = skewed_tokens(42, D), some_mask(42)
    filled = x.masked_fill(~mask[:, None], float("nan"))
    routing, alone = router(filled, RoutingContext(mask=mask)), router(x[mask])
    assert torch.equal(routing.expert[mask], alone.expert)
    assert torch.equal(routing.weight[mask], alone.weight)
    assert not routing.kept[~mask].any()
    assert torch.equal(routing.statistics["greedy_agreement"], alone.statistics["greedy_agreement"])


def test_greedy_agreement_counts_tokens_at_their_best_expert() -> None:
    router = BASELayerRouter(D, E, init_gain=1.0).train()
    x = skewed_tokens(32, D)
    routing = router(x)
    agreed = (routing.expert == (x @ router.weight.t()).argmax(1)).float().mean()
    assert 0 < float(agreed) < 1
    assert_close(routing.statistics["greedy_agreement"], agreed)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_the_weight(training: bool) -> None:
    router = BASELayerRouter(D, E, init_gain=1.0).double().train(training)
    x = skewed_tokens(8, D, dtype=torch.float64).requires_grad_()
    weight = router.weight.detach().clone().requires_grad_()

    def combine_weights(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(router, {"weight": weight}, (x,)).weight

    assert torch.autograd.gradcheck(combine_weights, (x, weight))


def test_centroids_are_orthogonal() -> None:
    for dim, num_experts in ((8, 4), (8, 8)):
        weight = routers.base_layers(dim, num_experts).weight.detach()
        assert_close(weight @ weight.t(), 0.01 * torch.eye(num_experts))
    weight = routers.base_layers(4, 9).weight.detach()
    assert_close(weight.t() @ weight, 0.01 * torch.eye(4))
    torch.manual_seed(0)
    half = BASELayerRouter(8, 4).bfloat16()
    half.reset_parameters()
    assert_close(half.weight.float() @ half.weight.float().t(), 0.01 * torch.eye(4, dtype=torch.bfloat16))


def test_errors() -> None:
    with pytest.raises(ValueError, match="got 0 and 4"):
        BASELayerRouter(0, 4)
    with pytest.raises(ValueError, match="got 4 and 0"):
        BASELayerRouter(4, 0)
    with pytest.raises(ValueError, match='"greedy" or "balanced": got \'best\''):
        BASELayerRouter(4, 4, eval_assignment="best")  # type: ignore[arg-type]
