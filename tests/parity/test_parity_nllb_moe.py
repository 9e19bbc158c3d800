"""Top-2 routing beside `NllbMoeTop2Router` and `NllbMoeSparseMLP` of Hugging Face transformers, weights copied over.

The router is fairseq's and equals ours: combine weights, decisions, gradients. Its layer does not compute what its
router decides; that and the router's other departures from the paper are asserted, so that a test fails when
transformers mends one.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moekit import MoELayer, routers
from moekit.experts import GroupedMLP
from moekit.functional import load_balance
from moekit.routing import Capacity, Routing, RoutingContext
from moekit.testing import assert_close, seeded, skewed_tokens, some_mask

pytest.importorskip("transformers", reason="parity is with transformers, of the extra test")
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import (
    NllbMoeExperts,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
    load_balancing_loss_func,
)

T, D, F, E = 40, 8, 12, 5


def config(**changes: object) -> NllbMoeConfig:
    options = {
        "d_model": D, "encoder_ffn_dim": F, "num_experts": E, "expert_capacity": 2 * T // E, "activation_dropout": 0.0,
        "moe_token_dropout": 0.0, "router_dtype": "float32", "second_expert_policy": "all", "vocab_size": 32,
        "activation_function": "relu", "router_bias": False,
    }  # fmt: skip
    return NllbMoeConfig(**(options | changes))


def tokens() -> Tensor:
    return skewed_tokens(T, D, seed=2) / 2


def scores() -> Tensor:
    return torch.randn(E, D, generator=torch.Generator().manual_seed(1))


def their_router(**changes: object) -> NllbMoeTop2Router:
    router = NllbMoeTop2Router(config(**changes)).train()
    with torch.no_grad():
        router.classifier.weight.copy_(scores())
    return router


def our_router(**options: object) -> routers.TopKRouter:
    settings = {"capacity": Capacity(train=1.0), "renormalise": "after_drop"} | options
    router = routers.TopKRouter(D, E, 2, **settings).train()  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.copy_(scores())
    return router


def combine(routing: Routing) -> Tensor:
    """Float[T, E]: the weight with which each expert's result enters each token's."""
    cell = routing.token * E + routing.expert
    return torch.zeros(T * E).index_add(0, cell, routing.weight * routing.kept).view(T, E)


@pytest.mark.parametrize(
    ("before", "prioritised", "padded", "training"), itertools.product([False, True], repeat=4), ids=str
)
def test_weights_decisions_and_gradients(before: bool, prioritised: bool, padded: bool, training: bool) -> None:
    """Capacity 2 * T / E, second choices all sent, renormalised before or after the drop, BPR, padding, evaluation."""
    theirs = their_router(normalize_router_prob_before_dropping=before, batch_prioritized_routing=prioritised)
    capacity = Capacity(train=1.0, eval=E / 2, priority="probability" if prioritised else "position")
    ours = our_router(capacity=capacity, renormalise="before_drop" if before else "after_drop")
    theirs.train(training)
    ours.train(training)
    mask = some_mask(T) if padded else torch.ones(T, dtype=torch.bool)
    x = tokens().requires_grad_()
    _, expected, _ = theirs(x, (~mask).long())
    routing = ours(x, RoutingContext(mask=mask))
    found = combine(routing)
    assert torch.equal(found > 0, expected > 0)
    assert_close(found, expected)
    assert routing.capacity == theirs.expert_capacity == (2 * T // E if training else T)
    assert bool(routing.kept[routing.queued].all()) == (not training), "the capacity bites in training"
    probe = torch.cos(torch.arange(T * E)).view(T, E)
    for name, a, b in zip(
        ("x", "router"),
        torch.autograd.grad((found * probe).sum(), [x, ours.weight]),
        torch.autograd.grad((expected * probe).sum(), [x, theirs.classifier.weight]),
        strict=True,
    ):
        assert_close(a, b, f"gradient of {name}")


def test_sampled_second_experts_are_the_same_draw() -> None:
    """Their Gumbel noise, seen through our exponential race: with -log of our exponential as their noise."""
    theirs, ours = their_router(second_expert_policy="sampling"), our_router(second_expert=routers.SampledChoice())
    with seeded(7):
        exponential = -torch.log1p(-torch.rand(T, E))
    with seeded(7):
        found = combine(ours(tokens()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributions.gumbel.Gumbel, "rsample", lambda self, shape: -exponential.log())
        _, expected, _ = theirs(tokens())
    assert_close(found, expected)
    best = tokens() @ scores().t()
    assert not torch.equal(found > 0, combine(our_router()(tokens())) > 0), "the draw is not the best second expert"
    assert bool((found.gather(1, best.argmax(-1, keepdim=True)) > 0).any())


def test_their_sampling_goes_on_in_evaluation_and_changes_the_logits() -> None:
    theirs = their_router(second_expert_policy="sampling").eval()
    first, second = theirs(tokens()), theirs(tokens())
    assert not torch.equal(first[1], second[1])
    assert not torch.allclose(first[2], tokens() @ scores().t())
    ours = our_router(second_expert=routers.SampledChoice()).eval()
    assert torch.equal(combine(ours(tokens())), combine(ours(tokens())))


def test_their_random_second_expert_uses_the_raw_probability() -> None:
    """Theirs sends it if 2 p2 > U with p2 as the softmax gave it; GShard's g2 is p2 / (p1 + p2), so ours sends more."""
    x = tokens() / 3
    uniform = torch.rand(T, generator=torch.Generator().manual_seed(3))
    probs = (x @ scores().t()).softmax(-1).topk(2).values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand_like", lambda like: uniform.view(like.shape))
        _, theirs, _ = their_router(second_expert_policy="random", expert_capacity=T)(x)
        half = routers.RandomChoice(0.5)
        roomy = Capacity(train=E / 2)
        raw = combine(our_router(second_expert=half, capacity=roomy)(x))
        gshard = combine(our_router(second_expert=half, capacity=roomy, renormalise="before_drop")(x))
    assert_close(raw, theirs, "with weights not renormalised before the draw ours is theirs")
    sent = (theirs > 0).sum(1) == 2
    assert torch.equal(sent, 2 * probs[:, 1] > uniform)
    more = (gshard > 0).sum(1) == 2
    assert torch.equal(more, 2 * probs[:, 1] / probs.sum(1) > uniform)
    assert int(more.sum()) > int(sent.sum())


def test_their_evaluation_capacity_stays_for_training() -> None:
    """The capacity is kept on the module: after one evaluation, training runs with evaluation's."""
    theirs = their_router()
    theirs(tokens())
    assert theirs.expert_capacity == 2 * T // E
    theirs.eval()(tokens())
    theirs.train()(tokens())
    assert theirs.expert_capacity == T
    ours = our_router(capacity=Capacity(train=1.0, eval=E / 2))
    assert ours(tokens()).capacity == 2 * T // E
    assert ours.eval()(tokens()).capacity == T
    assert ours.train()(tokens()).capacity == 2 * T // E


def layers() -> tuple[NllbMoeSparseMLP, MoELayer]:
    theirs = NllbMoeSparseMLP(config(), F).train()
    ours = MoELayer(our_router(), GroupedMLP(E, D, F, bias=True)).train()
    bank = ours.experts
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(scores())
        for e in range(E):
            expert = theirs.experts[f"expert_{e}"]
            for name, mine in (("fc1", (bank.w_in, bank.b_in)), ("fc2", (bank.w_out, bank.b_out))):
                layer = getattr(expert, name)
                mine[0][e].copy_(layer.weight.t())
                mine[1][e].copy_(layer.bias)
    return theirs, ours


def test_the_layer_that_their_router_means() -> None:
    """Their router and their experts, summed as their weights say: ours in outputs and all gradients."""
    theirs, ours = layers()
    x = tokens().requires_grad_()
    _, weight, _ = theirs.router(x)
    expected = sum(weight[:, e, None] * theirs.experts[f"expert_{e}"](x) for e in range(E))
    hidden = ours(x).hidden
    assert_close(hidden, expected)
    probe = torch.cos(torch.arange(T * D)).view(T, D)
    bank = ours.experts
    mine = torch.autograd.grad(
        (hidden * probe).sum(), [x, ours.router.weight, bank.w_in, bank.b_in, bank.w_out, bank.b_out]
    )
    experts = [theirs.experts[f"expert_{e}"] for e in range(E)]
    groups = [[e.fc1.weight for e in experts], [e.fc1.bias for e in experts]]
    groups += [[e.fc2.weight for e in experts], [e.fc2.bias for e in experts]]
    flat = [x, theirs.router.classifier.weight, *itertools.chain(*groups)]
    want = torch.autograd.grad((expected * probe).sum(), flat)
    assert_close(mine[0], want[0], "gradient of x")
    assert_close(mine[1], want[1], "gradient of the router")
    for n, name in enumerate(("w_in", "b_in", "w_out", "b_out")):
        grads = torch.stack([grad.t() if grad.dim() == 2 else grad for grad in want[2 + n * E : 2 + (n + 1) * E]])
        assert_close(mine[2 + n], grads, f"gradient of {name}")


def test_their_layer_runs_experts_0_and_1_only() -> None:
    """It makes a one-hot of the one-hot mask, so 0 and 1 are taken for experts: 1 computes all first choices, 0 the
    second ones, whoever was chosen."""
    theirs, ours = layers()
    x = tokens()
    found = theirs(x[None])[0]
    first, weight, _ = theirs.router(x)
    one, zero = theirs.experts["expert_1"](x), theirs.experts["expert_0"](x)
    assert_close(found, (weight * first).sum(1)[:, None] * one + (weight * (1 - first)).sum(1)[:, None] * zero)
    chosen = weight.sum(0) > 0
    assert bool(chosen[2:].all()), "the router did choose the others"
    with pytest.raises(AssertionError):
        assert_close(found, ours(x).hidden)


def test_their_output_masking_masks_numbers_and_scales_twice() -> None:
    """The paper's EOM masks a token's whole output, and scales in evaluation; theirs drops single numbers, already
    divided by 1 - p, and multiplies by 1 - p in evaluation as well."""
    experts = NllbMoeExperts(config(moe_token_dropout=0.5), F)
    x, mask = tokens(), torch.zeros(T, E, dtype=torch.int64)
    mask[:, 1] = 1
    weight = mask.float()
    full = experts["expert_1"](x)
    with seeded(0):
        trained = experts.train()(x, mask, weight)
    zeros = (trained == 0).sum(1)
    assert bool(((zeros > 0) & (zeros < D)).any()), "single numbers of a token are dropped"
    assert_close(trained[trained != 0], 2 * full[trained != 0])
    assert_close(experts.eval()(x, mask, weight), 0.5 * full)


def test_their_balance_loss_is_2_at_uniform_load() -> None:
    """f is summed over both choices and not divided by 2; ours is 1 at uniform load whatever k is."""
    logits = tokens() @ scores().t()
    probs = logits.softmax(-1)
    theirs = load_balancing_loss_func((logits,), E, top_k=2)
    assert_close(theirs, 2 * load_balance(probs, probs.topk(2).indices))
    ours = our_router(balance=routers.Balance(count="all"))(tokens()).losses["load_balance"]
    assert_close(theirs, 2 * ours)
    mask = some_mask(T)
    theirs = load_balancing_loss_func((logits,), E, top_k=2, attention_mask=mask[None].long())
    assert_close(theirs, 2 * load_balance(probs, probs.topk(2).indices, mask=mask))
