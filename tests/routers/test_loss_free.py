"""Loss-free balancing: choice by biased score, weight by score alone, the bias's move; parity with transformers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from moekit.experts import GroupedGLU
from moekit.functional import load_balance
from moekit.layer import MoELayer
from moekit.routers import Balance, GroupLimit, LossFreeRouter, deepseek_v3, loss_free
from moekit.routing import Capacity, RoutingContext
from moekit.testing import assert_close, seeded, skewed_tokens

T, D, E = 18, 6, 8


def trained(router: LossFreeRouter, dtype: torch.dtype = torch.float64) -> LossFreeRouter:
    """Scores spread out, and a bias large enough to change choices."""
    router.to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        router.weight.copy_(0.4 * torch.randn(router.num_experts, D, generator=generator))
        router.bias.copy_(0.2 * torch.randn(router.num_experts, generator=generator))
    return router


def context(padded: bool) -> RoutingContext:
    mask = torch.arange(T) % 5 != 2 if padded else torch.ones(T, dtype=torch.bool)
    return RoutingContext(mask=mask, sequence=torch.arange(T) // 6)


@pytest.mark.parametrize(
    ("score", "renormalise", "padded"), itertools.product(["sigmoid", "softmax"], [False, True], [False, True])
)
def test_equals_the_loop(score: str, renormalise: bool, padded: bool) -> None:
    k = 3
    router = trained(LossFreeRouter(D, E, k, score=score, renormalise=renormalise, scaling_factor=1.7))  # type: ignore[arg-type]
    x = skewed_tokens(T, D, dtype=torch.float64, seed=1).requires_grad_()
    ctx = context(padded)
    loop: dict[tuple[int, int], Tensor] = {}
    differs = 0
    for s in ctx.mask.nonzero().flatten().tolist():  # type: ignore[union-attr]
        logits = torch.stack([(x[s] * row).sum() for row in router.weight])
        scores = 1 / (1 + (-logits).exp()) if score == "sigmoid" else logits.exp() / logits.exp().sum()
        chosen = sorted(range(E), key=lambda e: -float(scores[e].detach() + router.bias[e]))[:k]
        differs += set(chosen) != set(scores.topk(k).indices.tolist())
        total = sum((scores[e] for e in chosen), torch.zeros(())) if renormalise else 1.0
        loop |= {(s, e): 1.7 * scores[e] / total for e in chosen}
    assert differs >= 3  # the bias matters here
    routing = router.train()(x, ctx)
    found = {(int(t), int(e)): n for n, (t, e) in enumerate(zip(routing.token, routing.expert, strict=True))}
    assert {key for key, n in found.items() if routing.kept[n]} == set(loop)
    for key, weight in loop.items():
        assert_close(routing.weight[found[key]], weight, f"weight of {key}")
    values = torch.cos(torch.arange(T * E, dtype=torch.float64)).view(T, E)
    scalar = (routing.weight * routing.kept * values[routing.token, routing.expert]).sum()
    expected = sum((weight * values[key] for key, weight in loop.items()), torch.zeros(()))
    for a, b in zip(*(torch.autograd.grad(v, (x, router.weight)) for v in (scalar, expected)), strict=True):
        assert_close(a, b, "gradient")
    assert routing.losses == {}


def test_group_limit_equals_the_loop() -> None:
    limit = GroupLimit(4, 2)
    scores = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    found = limit(scores)
    for row, limited in zip(scores.tolist(), found.tolist(), strict=True):
        groups = [row[3 * g : 3 * g + 3] for g in range(4)]
        best = sorted(range(4), key=lambda g: -sum(sorted(groups[g])[-2:]))[:2]
        for e in range(12):
            assert limited[e] == pytest.approx(row[e] if e // 3 in best else float("-inf"))


def test_bias_moves_against_the_load_by_its_sign() -> None:
    router = loss_free(D, 4, k=1, update_rate=0.25)
    routing = router(torch.randn(10, D))
    # Loads 5, 3, 2, 2: the mean is 3.
    for expert in ([0, 0, 0, 1, 1], [0, 0, 1, 2, 2, 3, 3]):
        n = len(expert)
        router.observe(
            type(routing)(
                token=torch.arange(n),
                expert=torch.tensor(expert),
                weight=torch.ones(n),
                position=torch.zeros(n, dtype=torch.int64),
                kept=torch.ones(n, dtype=torch.bool),
                num_tokens=n,
                num_experts=4,
            )
        )
    router.on_step_end(1)
    assert router.bias.tolist() == [-0.25, 0.0, 0.25, 0.25]
    router.on_step_end(2)  # nothing was observed: nothing moves
    assert router.bias.tolist() == [-0.25, 0.0, 0.25, 0.25]
    router.update_rate = 0.0
    router.observe(routing)
    router.on_step_end(3)
    assert router.bias.tolist() == [-0.25, 0.0, 0.25, 0.25]


def test_bias_balances_without_touching_the_weights() -> None:
    router = trained(loss_free(D, E, k=2, update_rate=0.01)).train()
    with torch.no_grad():
        router.bias.zero_()
    x = skewed_tokens(400, D, dtype=torch.float64)
    before, violation = router.weight.clone(), []
    for step in range(200):
        routing = router(x)
        load = torch.bincount(routing.expert, minlength=E).double()
        violation.append(float(load.max() / load.mean()) - 1)
        router.observe(routing)
        router.on_step_end(step)
    assert violation[0] > 1.0
    assert sum(violation[-20:]) / 20 < 0.35
    assert torch.equal(router.weight, before)


def test_bias_stays_float32_in_a_bf16_model() -> None:
    """bf16 would lose a step of 0.001 on a bias of 0.5."""
    router = loss_free(D, E)
    with torch.no_grad():
        router.bias.copy_(torch.linspace(0.5, 0.6, E))
    bias = router.bias.clone()
    layers = torch.nn.ModuleList([router]).to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, bias)
    router.observe(router(torch.randn(T, D)))
    router.on_step_end(1)
    moved = (router.bias - bias).abs()
    assert bool(((moved - 1e-3).abs() < 1e-6).any())
    assert layers.double()[0].bias.dtype == torch.float64  # type: ignore[union-attr]
    with torch.device("meta"):
        empty = loss_free(D, E).half()
    assert empty.bias.dtype == torch.float32
    assert empty.to_empty(device="cpu").bias.shape == (E,)


@pytest.mark.parametrize("padded", [False, True])
def test_sequence_wise_loss_of_deepseek_v3(padded: bool) -> None:
    """Eq. 17-20 for each sequence: sum_e f_e P_e, f_e = E / (k T) * hits, P_e = mean of the scores scaled to sum 1."""
    k = 3
    router = trained(deepseek_v3(D, E, k=k))
    x = skewed_tokens(T, D, dtype=torch.float64, seed=1).requires_grad_()
    ctx = context(padded)
    routing = router.train()(x, ctx)
    total, sequences = torch.zeros((), dtype=torch.float64), 0
    for sequence in range(3):
        members = [s for s in range(T) if s // 6 == sequence and ctx.mask[s]]  # type: ignore[index]
        scores = torch.stack([torch.sigmoid(router.weight @ x[s]) for s in members])
        hits = [0] * E
        for row in scores:
            for e in row.topk(k).indices.tolist():  # eq. 18: without the bias
                hits[e] += 1
        normed = scores / scores.sum(1, keepdim=True)
        f = [E / (k * len(members)) * h for h in hits]
        total = total + sum((f[e] * normed[:, e].mean() for e in range(E)), torch.zeros(()))
        sequences += 1
    assert_close(routing.losses["load_balance"], total / sequences)
    found, expected = (
        torch.autograd.grad(v, router.weight)[0] for v in (routing.losses["load_balance"], total / sequences)
    )
    assert_close(found, expected, "gradient")


def test_the_sequence_wise_loss_has_a_gradient_where_the_bias_balances() -> None:
    """Two experts' scores are higher at every token, and the bias sends equal loads: the paper's loss still sees it."""
    x = torch.randn(256, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1.0
    ctx, gradients, losses = RoutingContext(sequence=torch.zeros(256, dtype=torch.int64)), {}, {}
    for choices in ("unbiased", "biased"):
        router = trained(deepseek_v3(D, 4, k=2, balance_choices=choices, update_rate=0.01))
        with torch.no_grad():
            router.weight[:2, 0] += 2.0
        for step in range(300):
            router.update_rate = 0.01 if step < 100 else 0.001
            routing = router(x, ctx)
            router.observe(routing)
            router.on_step_end(step)
        losses[choices] = router(x, ctx).losses["load_balance"]
        gradients[choices] = float(torch.autograd.grad(losses[choices], router.weight)[0].norm())
    assert float(losses["biased"].detach()) == pytest.approx(1.0, abs=0.02)
    scores = (x @ router.weight.t()).sigmoid()
    share = torch.bincount(scores.topk(2).indices.flatten(), minlength=4) * 4 / 512
    expected = (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    assert_close(losses["unbiased"], expected)
    assert float(expected.detach()) > 1.2
    assert gradients["unbiased"] > 5 * gradients["biased"]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_unbiased_choices_of_scope_global_add_up(score: str) -> None:
    """Micro-batches with padding: the earlier ones count by their scores too, and only their real tokens."""
    balance = Balance(count="all", scope="global")
    options = {"balance": balance, "balance_choices": "unbiased", "score": score, "groups": GroupLimit(4, 2)}
    router = trained(LossFreeRouter(D, E, 2, **options)).train()  # type: ignore[arg-type]
    one, two = (skewed_tokens(T, D, dtype=torch.float64, seed=seed) for seed in (0, 1))
    first = router(one, context(True))
    router.observe(first)
    second = router(two, context(True))
    mask = context(True).mask
    assert mask is not None

    def probs(x: Tensor) -> Tensor:
        logits = x @ router.weight.t()
        scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
        return scores / scores.sum(-1, keepdim=True)

    earlier = torch.bincount(probs(one)[mask].topk(2).indices.flatten(), minlength=E)
    chosen = probs(two).topk(2).indices
    assert not torch.equal(earlier, torch.bincount(first.expert[first.queued], minlength=E))  # the bias matters
    expected = load_balance(probs(two), chosen, mask=mask, scope="global", earlier=earlier)
    assert_close(second.losses["load_balance"], expected)
    again = router.imposed(two, context(True), first)
    assert_close(again.losses["load_balance"], expected)
    router.on_step_end(1)
    assert router._balance_window.counts is None


def test_global_balance_beside_the_bias_counts_as_it_says() -> None:
    balance = Balance(count="first", scope="global")
    router = trained(LossFreeRouter(D, E, 2, balance=balance)).train()
    one, two = (skewed_tokens(T, D, dtype=torch.float64, seed=seed) for seed in (0, 1))
    first = router(one)
    router.observe(first)
    second = router(two)
    scores = (two @ router.weight.t()).sigmoid()
    expected = load_balance(
        scores / scores.sum(-1, keepdim=True),
        second.expert[:T, None],
        scope="global",
        earlier=torch.bincount(first.expert[:T], minlength=E),
    )
    assert_close(second.losses["load_balance"], expected)
    router.on_step_end(1)
    assert router._balance_window.counts is None


def test_gradcheck() -> None:
    router = trained(deepseek_v3(D, E, k=3, groups=GroupLimit(4, 2))).train()
    ctx = RoutingContext(mask=torch.arange(6) != 4, sequence=torch.arange(6) // 3)

    def outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        routing = functional_call(router, {"weight": weight}, (x, ctx))
        return routing.weight, *routing.losses.values()

    x = skewed_tokens(6, D, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, router.weight.detach().requires_grad_()))


@pytest.mark.parametrize(
    ("groups", "chosen", "renormalise", "experts"),
    [(1, 1, True, 8), (4, 2, True, 8), (2, 1, False, 8), (4, 3, True, 16)],
)
def test_parity_with_transformers(groups: int, chosen: int, renormalise: bool, experts: int) -> None:
    """Decisions, weights and gradients of DeepSeek-V3's router in transformers, with its weights and bias."""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(
        hidden_size=D,
        n_routed_experts=experts,
        num_experts_per_tok=3,
        n_group=groups,
        topk_group=chosen,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )
    theirs = modeling.DeepseekV3TopkRouter(config)
    ours = LossFreeRouter(
        D,
        experts,
        3,
        renormalise=renormalise,
        scaling_factor=2.5,
        groups=GroupLimit(groups, chosen) if groups > 1 else None,
        init_scale=1.0,
    )
    with torch.no_grad(), seeded(1):
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(0.3 * torch.randn(experts))
        ours.bias.copy_(theirs.e_score_correction_bias)
    x = skewed_tokens(50, D, seed=4)
    probe = torch.cos(torch.arange(50.0 * experts)).view(50, experts)
    results = []
    for which in ("theirs", "ours"):
        leaf = x.clone().requires_grad_()
        if which == "theirs":
            _, weight, index = theirs(leaf)
            dense = torch.zeros(50, experts).scatter(1, index, weight)
            parameter = theirs.weight
        else:
            routing = ours.train()(leaf)
            assert routing.token.numel() == 150
            dense = torch.zeros(50, experts).index_put((routing.token, routing.expert), routing.weight)
            parameter = ours.weight
        results.append((dense, *torch.autograd.grad((dense * probe).sum(), (leaf, parameter))))
    (a, *grads_a), (b, *grads_b) = results
    assert torch.equal(a != 0, b != 0)
    assert_close(b, a, "weights")
    for name, found, expected in zip(("x", "router"), grads_b, grads_a, strict=True):
        assert_close(found, expected, f"gradient of {name}")


def test_parity_of_the_layer_with_transformers() -> None:
    """The whole sparse layer of DeepSeek-V3, shared expert included: output and gradients."""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    hidden = 5
    config = modeling.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=hidden,
        n_routed_experts=E,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        hidden_act="silu",
    )
    config._experts_implementation = "eager"
    theirs = modeling.DeepseekV3MoE(config)
    router = deepseek_v3(D, E, k=3, groups=GroupLimit(4, 2), balance=None)
    bank = GroupedGLU(E, D, hidden, activation="silu", init_scale=1.0)
    shared = modeling.DeepseekV3MLP(config, hidden)
    ours = MoELayer(router, bank, shared=shared).train()
    with torch.no_grad(), seeded(2):
        theirs.gate.weight.copy_(torch.randn(E, D))
        theirs.gate.e_score_correction_bias.copy_(0.3 * torch.randn(E))
        router.weight.copy_(theirs.gate.weight)
        router.bias.copy_(theirs.gate.e_score_correction_bias)
        theirs.experts.gate_up_proj.copy_(torch.cat([bank.w_gate, bank.w_up], dim=2).transpose(1, 2))
        theirs.experts.down_proj.copy_(bank.w_out.transpose(1, 2))
        shared.load_state_dict(theirs.shared_experts.state_dict())
    outputs, grads = [], []
    for layer in (theirs, ours):
        x = skewed_tokens(30, D, seed=5).view(3, 10, D).requires_grad_()
        out = layer(x)
        out = out if isinstance(out, Tensor) else out.hidden
        out.square().sum().backward()
        outputs.append(out)
        grads.append(x.grad)
    assert_close(outputs[1], outputs[0], "output")
    assert_close(grads[1], grads[0], "gradient of x")
    assert_close(router.weight.grad, theirs.gate.weight.grad, "gradient of the router")
    assert_close(bank.w_out.grad, theirs.experts.down_proj.grad.transpose(1, 2), "gradient of the experts")


def test_capacity_is_honoured_and_load_counts_what_asked() -> None:
    router = trained(LossFreeRouter(D, E, 2, capacity=Capacity(train=0.5, minimum=1))).train()
    routing = router(skewed_tokens(T, D, dtype=torch.float64))
    assert routing.capacity == 3
    router.observe(routing)
    assert int(router._load.counts.sum()) == 2 * T > int(routing.kept.sum())  # type: ignore[union-attr]


def test_refuses() -> None:
    with pytest.raises(ValueError, match="got k=5 and 4"):
        LossFreeRouter(D, E, 5, groups=GroupLimit(4, 2))
    with pytest.raises(ValueError, match="got 8 experts in 3 groups"):
        LossFreeRouter(D, E, 2, groups=GroupLimit(3, 2))
    with pytest.raises(ValueError, match="best=2 experts each: got 8 experts in 8 groups"):
        LossFreeRouter(D, E, 2, groups=GroupLimit(8, 2))
    with pytest.raises(ValueError, match="renormalise=True with k=1"):
        LossFreeRouter(D, E, 1, renormalise=True)
    with pytest.raises(ValueError, match='score must be "sigmoid" or "softmax"'):
        LossFreeRouter(D, E, 2, score="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='balance_choices must be "biased" or "unbiased"'):
        LossFreeRouter(D, E, 2, balance_choices="scores")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="counts choices that nobody sends"):
        deepseek_v3(D, E, k=2, balance=Balance(when="after_drop"))
    with pytest.raises(ValueError, match="chosen=3 and groups=2"):
        GroupLimit(2, 3)
    with pytest.raises(ValueError, match="best must be at least 1: got 0"):
        GroupLimit(2, 1, best=0)
    with pytest.raises(ValueError, match=r"RoutingContext\.sequence is None"):
        deepseek_v3(D, E, k=2)(torch.randn(4, D))
