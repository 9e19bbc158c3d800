"""The dense-to-sparse gate against a loop, its schedules, and its way from all experts to one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from moekit.functional import load_balance
from moekit.routers import DenseToSparseRouter, ExponentialDecay, LinearDecay, dense_to_sparse
from moekit.routing import RoutingContext
from moekit.testing import assert_close, seeded, skewed_tokens

T, D, E = 16, 5, 6


def trained(router: DenseToSparseRouter, step: int = 0) -> DenseToSparseRouter:
    router.double()
    with torch.no_grad():
        router.weight.copy_(0.5 * torch.randn(E, D, generator=torch.Generator().manual_seed(1)))
    router.on_step_end(step)
    return router


def gumbel(seed: int) -> Tensor:
    """The noise that a router draws first from this seed."""
    with seeded(seed):
        return -torch.empty(T, E, dtype=torch.float64).exponential_().log()


@pytest.mark.parametrize(
    ("weights", "training", "padded", "step"),
    itertools.product(["gumbel", "plain"], [True, False], [False, True], [0, 6, 10]),
)
def test_equals_the_loop(weights: str, training: bool, padded: bool, step: int) -> None:
    """p = softmax((l + zeta) / tau); an expert runs where p > threshold; from step 10 only the argmax."""
    router = trained(
        DenseToSparseRouter(D, E, LinearDecay(1.5, 0.5, 8), hard_from=10, threshold=0.12, weights=weights),  # type: ignore[arg-type]
        step,
    ).train(training)
    x = skewed_tokens(T, D, dtype=torch.float64, seed=2).requires_grad_()
    mask = torch.arange(T) % 5 != 2 if padded else torch.ones(T, dtype=torch.bool)
    noise = gumbel(4) * training
    tau = {0: 1.5, 6: 1.5 - 1.0 * 6 / 8, 10: 0.5}[step]  # exact in float32, in which schedules compute
    loop: dict[tuple[int, int], Tensor] = {}
    for s in range(T):
        if not mask[s]:
            continue
        logits = torch.stack([(x[s] * row).sum() for row in router.weight])
        noisy = ((logits + noise[s]) / tau).exp()
        gate, plain = noisy / noisy.sum(), logits.exp() / logits.exp().sum()
        best = max(range(E), key=lambda e: float(gate[e].detach()))
        for e in range(E):
            if e == best or (step < 10 and float(gate[e].detach()) > 0.12):
                loop[s, e] = (gate if weights == "gumbel" else plain)[e]
    with seeded(4):
        routing = router(x, RoutingContext(mask=mask))
    found = list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    assert found == sorted(loop)
    assert routing.capacity is None
    assert bool(routing.kept.all())
    for n, key in enumerate(found):
        assert_close(routing.weight[n], loop[key], f"weight of {key}", floor=1e-3)
    assert float(routing.statistics["active_experts"]) == pytest.approx(len(loop) / int(mask.sum()))
    assert float(routing.statistics["temperature"]) == pytest.approx(tau)
    values = torch.cos(torch.arange(T * E, dtype=torch.float64)).view(T, E)
    scalar = (routing.weight * values[routing.token, routing.expert]).sum()
    expected = sum((weight * values[key] for key, weight in loop.items()), torch.zeros(()))
    pairs = zip(*(torch.autograd.grad(v, (x, router.weight)) for v in (scalar, expected)), strict=True)
    for a, b in pairs:
        assert_close(a, b, "gradient")


def test_experts_fall_from_all_to_one() -> None:
    router = trained(dense_to_sparse(D, E, decay_steps=100, start=2.0, end=0.05)).train()
    x = skewed_tokens(400, D, dtype=torch.float64)
    active, counts = [], []
    for step in (0, 25, 50, 75, 99, 100):
        router.on_step_end(step)
        with seeded(0):
            routing = router(x)
        per_token = torch.bincount(routing.token, minlength=400)
        active.append(float(per_token.double().mean()))
        counts.append(per_token)
    assert active[0] > 0.95 * E
    assert all(a > b for a, b in itertools.pairwise(active))
    assert len(counts[2].unique()) >= 3  # how many depends on the token
    assert bool((counts[-1] == 1).all())


def test_a_token_always_keeps_one_expert() -> None:
    router = trained(DenseToSparseRouter(D, E, LinearDecay(1.0, 1.0, 1), threshold=0.99)).train()
    routing = router(torch.zeros(T, D, dtype=torch.float64))
    assert torch.equal(routing.token, torch.arange(T))


def test_evaluation_is_the_clean_gate_at_the_temperature_of_the_step() -> None:
    router = trained(dense_to_sparse(D, E, decay_steps=10, threshold=0.1, hard_from=20), step=10).eval()
    x = skewed_tokens(T, D, dtype=torch.float64)
    routing = router(x)
    gate = (x @ router.weight.t() / 0.5).softmax(-1)
    assert_close(routing.weight, gate[routing.token, routing.expert], "weights")
    assert routing.token.numel() == int((gate > 0.1).sum())


def test_noise_is_gumbel() -> None:
    """With equal scores the argmax is uniform; with scores l it is expert e with probability softmax(l)_e."""
    router = trained(dense_to_sparse(D, E), step=10**6).train()
    x = torch.ones(20_000, D, dtype=torch.float64)
    with seeded(0):
        routing = router(x)
    share = torch.bincount(routing.expert, minlength=E).double() / 20_000
    expected = (router.weight.sum(1)).softmax(-1)
    assert bool((share - expected).abs().max() < 4 * 0.5 / 20_000**0.5)


def test_balance_loss_is_that_of_the_most_probable_expert() -> None:
    router = trained(dense_to_sparse(D, E)).eval()
    x = skewed_tokens(T, D, dtype=torch.float64)
    mask = torch.arange(T) % 3 != 0
    plain = (x @ router.weight.t()).softmax(-1)
    expected = load_balance(plain, plain.argmax(-1, keepdim=True), mask=mask)
    assert_close(router(x, RoutingContext(mask=mask)).losses["load_balance"], expected)


@pytest.mark.parametrize("weights", ["gumbel", "plain"])
def test_gradcheck(weights: str) -> None:
    router = trained(DenseToSparseRouter(D, E, LinearDecay(1.0, 0.5, 2), threshold=0.15, weights=weights), 1).train()  # type: ignore[arg-type]
    mask = torch.arange(6) != 4

    def outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with seeded(2):
            routing = functional_call(router, {"weight": weight}, (x, RoutingContext(mask=mask)))
        return routing.weight, *routing.losses.values()

    x = skewed_tokens(6, D, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, router.weight.detach().requires_grad_()))


def test_schedules() -> None:
    exponential, linear = ExponentialDecay(1.0, 0.5, 100), LinearDecay(2.0, 0.3, 10)
    for step, expected in ((0, 1.0), (50, math.sqrt(0.5)), (100, 0.5), (10**7, 0.5)):
        # The released code: max(start * exp(step * ln(end / start) / steps), end).
        assert expected == pytest.approx(max(math.exp(step * math.log(0.5) / 100), 0.5))
        assert float(exponential(torch.tensor(step))) == pytest.approx(expected, rel=1e-6)
    for step, expected in ((0, 2.0), (5, 1.15), (10, 0.3), (99, 0.3)):
        assert float(linear(torch.tensor(step))) == pytest.approx(expected, rel=1e-6)
    for cls in (ExponentialDecay, LinearDecay):
        with pytest.raises(ValueError, match=r"start and end above 0: got 1\.0 and 0"):
            cls(1.0, 0.0, 5)
        with pytest.raises(ValueError, match="at least 1 step: got 0"):
            cls(1.0, 0.5, 0)


def test_the_step_is_in_the_checkpoint() -> None:
    router = trained(dense_to_sparse(D, E, decay_steps=10), step=7)
    other = dense_to_sparse(D, E, decay_steps=10).double()
    other.load_state_dict(router.state_dict())
    x = skewed_tokens(T, D, dtype=torch.float64)
    with seeded(0):
        first = router.train()(x)
    with seeded(0):
        second = other.train()(x)
    assert torch.equal(first.weight, second.weight)
    assert float(second.statistics["temperature"]) == pytest.approx(0.5**0.7)


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\): got 1.0"):
        dense_to_sparse(D, E, threshold=1.0)
    with pytest.raises(ValueError, match='weights must be "gumbel" or "plain": got \'noisy\''):
        dense_to_sparse(D, E, weights="noisy")  # type: ignore[arg-type]
