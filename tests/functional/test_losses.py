"""Router losses against literal loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moekit.functional import load_balance, router_z
from moekit.testing import assert_close, run_distributed

T, E, K = 23, 5, 2


def literal_balance(
    probs: Tensor, expert: Tensor, counted: Tensor | None, mask: Tensor | None, groups: Tensor
) -> Tensor:
    """E * sum_e f_e * P_e for each group of tokens, then the mean over groups that have a real token."""
    t, e = probs.shape
    values = []
    for group in sorted(set(groups.tolist())):
        tokens = [s for s in range(t) if groups[s] == group and (mask is None or mask[s])]
        if not tokens:
            continue
        hits = [0] * e
        for s in tokens:
            for choice in range(expert.shape[1]):
                if counted is None or counted[s, choice]:
                    hits[int(expert[s, choice])] += 1
        total = torch.zeros((), dtype=probs.dtype)
        for n in range(e):
            mean = sum((probs[s, n] for s in tokens), torch.zeros((), dtype=probs.dtype)) / len(tokens)
            total = total + e * hits[n] / max(sum(hits), 1) * mean
        values.append(total)
    return sum(values, torch.zeros((), dtype=probs.dtype)) / max(len(values), 1)


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    probs = logits.softmax(-1)
    counted = torch.rand(T, K, generator=generator) < 0.7
    mask = torch.rand(T, generator=generator) < 0.7
    sequence = torch.arange(T) // 6
    mask[sequence == 1] = False  # a sequence of nothing but padding
    return probs, probs.topk(K).indices, counted, mask, sequence


@pytest.mark.parametrize(
    ("scope", "choices", "drop", "padded"),
    itertools.product(["batch", "sequence", "global"], [1, K], [False, True], [False, True]),
)
def test_load_balance_equals_the_loop(scope: str, choices: int, drop: bool, padded: bool) -> None:
    probs, expert, counted, mask, sequence = case()
    probs.requires_grad_()
    counted_, mask_ = counted[:, :choices] if drop else None, mask if padded else None
    found = load_balance(
        probs,
        expert[:, :choices],
        counted_,
        mask=mask_,
        sequence=sequence if scope == "sequence" else None,
        scope=scope,  # type: ignore[arg-type]
    )
    groups = sequence if scope == "sequence" else torch.zeros(T, dtype=torch.int64)
    expected = literal_balance(probs, expert[:, :choices], counted_, mask_, groups)
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(loss, probs)[0] for loss in (found, expected)), "gradient")  # type: ignore[misc]


def test_load_balance_is_one_at_uniform_load() -> None:
    probs = torch.full((8, 4), 0.25)
    assert float(load_balance(probs, torch.arange(8)[:, None] % 4)) == 1.0
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 1.0
    assert float(load_balance(collapsed, torch.full((8, 1), 2))) == 4.0
    # Uniform load or uniform probabilities: each alone is enough for the minimum.
    assert float(load_balance(probs, torch.full((8, 1), 2))) == 1.0
    assert float(load_balance(collapsed, torch.arange(8)[:, None] % 4)) == 1.0
    # Several choices do not change the scale.
    two = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], 1)
    assert float(load_balance(probs, two)) == 1.0


def test_gradient_flows_through_probabilities_alone() -> None:
    """d loss / d P is E * f / number of real tokens: shares are constants."""
    probs, expert, _, mask, _ = case()
    probs.requires_grad_()
    (grad,) = torch.autograd.grad(load_balance(probs, expert, mask=mask), probs)
    share = torch.bincount(expert[mask].flatten(), minlength=E).double() / (K * int(mask.sum()))
    assert_close(grad, mask[:, None] * E * share / mask.sum())


def test_padding_is_in_no_denominator() -> None:
    """Rows added as padding, NaN included, change neither the loss nor its gradient."""
    probs, expert, counted, _, sequence = case()
    extra = torch.full((9, E), float("nan"), dtype=torch.float64)
    logits = torch.randn(T, E, dtype=torch.float64)
    longer_mask = torch.arange(T + 9) < T
    for scope in ("batch", "sequence"):
        kwargs = {"scope": scope}
        plain = load_balance(probs, expert, counted, sequence=sequence, **kwargs)  # type: ignore[arg-type]
        wide = torch.cat([probs, extra]).requires_grad_()
        padded = load_balance(
            wide,
            torch.cat([expert, expert[:9]]),
            torch.cat([counted, counted[:9]]),
            mask=longer_mask,
            sequence=torch.cat([sequence, sequence[:9]]),
            **kwargs,  # type: ignore[arg-type]
        )
        assert_close(padded, plain, scope)
        (grad,) = torch.autograd.grad(padded, wide)
        assert not grad[T:].any()
        assert bool(grad.isfinite().all())
    wide = torch.cat([logits, extra]).requires_grad_()
    loss = router_z(wide, longer_mask)
    assert_close(loss, router_z(logits))
    (grad,) = torch.autograd.grad(loss, wide)
    assert not grad[T:].any()
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("scope", ["batch", "sequence", "global"])
def test_no_real_token_gives_zero(scope: str) -> None:
    for t in (0, 4):
        probs = torch.full((t, 3), 1 / 3, requires_grad=True)
        mask, sequence = torch.zeros(t, dtype=torch.bool), torch.zeros(t, dtype=torch.int64)
        expert = torch.zeros(t, 1, dtype=torch.int64)
        loss = load_balance(probs, expert, mask=mask, sequence=sequence, scope=scope)  # type: ignore[arg-type]
        assert float(loss.detach()) == 0.0
        assert float(router_z(probs, mask).detach()) == 0.0
        loss.backward()
        assert probs.grad is not None
        assert not probs.grad.any()
    assert float(router_z(torch.zeros(0, 3))) == 0.0


def test_load_balance_refuses() -> None:
    probs, expert, *_ = case()
    with pytest.raises(ValueError, match=r"RoutingContext\.sequence is None"):
        load_balance(probs, expert, scope="sequence")
    with pytest.raises(ValueError, match='scope must be "batch", "sequence" or "global": got \'world\''):
        load_balance(probs, expert, scope="world")  # type: ignore[arg-type]


@pytest.mark.parametrize("padded", [False, True])
def test_router_z_equals_the_loop(padded: bool) -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    mask = torch.rand(T) < 0.6 if padded else None
    squares = [
        math.log(sum(math.exp(v) for v in row)) ** 2 for s, row in enumerate(logits.tolist()) if mask is None or mask[s]
    ]
    assert float(router_z(logits, mask)) == pytest.approx(sum(squares) / len(squares), rel=1e-12)


def global_balance() -> list[Tensor]:
    """On each of two ranks with other tokens: loss and gradient for the world and for a group of one."""
    rank = dist.get_rank()
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    probs, expert, counted, mask, _ = case(seed=rank)
    probs.requires_grad_()
    results = []
    for group in (None, alone):
        loss = load_balance(probs, expert, counted, mask=mask, scope="global", group=group)
        (grad,) = torch.autograd.grad(loss, probs)
        results += [loss.detach(), grad]
    return results


def test_global_scope_sums_counts_over_ranks() -> None:
    """f over both ranks, P over the rank's tokens and the mean number of them; a group of one is the batch."""
    cases = [case(seed) for seed in (0, 1)]
    tokens = sum(mask.sum() for *_, mask, _ in cases) / 2
    assert cases[0][3].sum() != cases[1][3].sum()
    hits = torch.zeros(E, dtype=torch.float64)
    for _, expert, counted, mask, _ in cases:
        hits += torch.bincount(expert[counted & mask[:, None]], minlength=E)
    results = run_distributed(global_balance, 2)
    whole = torch.cat([probs[mask] for probs, _, _, mask, _ in cases]).mean(0)
    mean = (results[0][0] + results[1][0]) / 2
    assert_close(mean, E * (hits / hits.sum() * whole).sum(), "the mean of the ranks' losses is that of all tokens")
    for rank, (world, world_grad, alone, alone_grad) in enumerate(results):
        probs, expert, counted, mask, _ = cases[rank]
        assert_close(world, E * (hits / hits.sum() * probs[mask].sum(0) / tokens).sum(), f"rank {rank}")
        assert_close(world_grad, mask[:, None] * E * (hits / hits.sum()) / tokens, f"gradient, rank {rank}")
        probs.requires_grad_()
        batch = load_balance(probs, expert, counted, mask=mask)
        assert_close(alone, batch, f"group of one, rank {rank}")
        assert_close(alone_grad, torch.autograd.grad(batch, probs)[0], f"group of one, gradient, rank {rank}")
        assert abs(float(world) - float(alone)) > 1e-3  # the two scopes differ on these tokens


@pytest.mark.parametrize(("scope", "padded"), itertools.product(["batch", "sequence", "global"], [False, True]))
def test_gradcheck(scope: str, padded: bool) -> None:
    """float64: analytic gradients equal finite differences, through probabilities and through logits."""
    probs, expert, counted, mask, sequence = case()
    mask_ = mask if padded else None
    earlier = torch.arange(E) if scope == "global" else None

    def balance(logits: Tensor) -> Tensor:
        probs = logits.softmax(-1)
        return load_balance(probs, expert, counted, mask=mask_, sequence=sequence, scope=scope, earlier=earlier)  # type: ignore[arg-type]

    logits = probs.log().requires_grad_()
    assert torch.autograd.gradcheck(balance, (logits,))
    assert torch.autograd.gradcheck(lambda x: router_z(x, mask_), (logits,))


def test_router_z_of_zero_logits_is_the_squared_logarithm_of_e() -> None:
    for experts in (1, 4, 64):
        assert float(router_z(torch.zeros(7, experts))) == pytest.approx(math.log(experts) ** 2, rel=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_earlier_micro_batches_join_the_shares(padded: bool) -> None:
    """f over what was counted before and now; P and the gradient of this micro-batch alone."""
    probs, expert, counted, mask, _ = case()
    mask_ = mask if padded else torch.ones(T, dtype=torch.bool)
    earlier = torch.tensor([4, 0, 1, 7, 2])
    hits = torch.bincount(expert[counted & mask_[:, None]], minlength=E).double() + earlier
    expected = E * (hits / hits.sum() * probs[mask_].mean(0)).sum()
    assert_close(load_balance(probs, expert, counted, mask=mask_, scope="global", earlier=earlier), expected)
    assert earlier.tolist() == [4, 0, 1, 7, 2]
