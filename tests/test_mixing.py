"""Branches beside the experts, and masking of experts' outputs."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from moekit import AuxLosses, MoELayer, Routing, RoutingContext, routers
from moekit.experts import GroupedMLP
from moekit.functional import moe_reference
from moekit.mixing import ConditionalMix, ExpertOutputMasking, Mix, SoftmaxMix
from moekit.testing import assert_close, assert_same, seeded, trace
from moekit.transformer import MLP

D, E, T = 6, 4, 23
MASK = torch.arange(T) % 5 < 3
MIXES = {
    "softmax": lambda: SoftmaxMix(D),
    "conditional": lambda: ConditionalMix(D, budget=0.8),
    "conditional, by layer": lambda: ConditionalMix(D, budget=0.8, scope="layer"),
}


def layer(mix: Mix | None, **options: Any) -> MoELayer:
    with seeded(0):
        return MoELayer(
            routers.TopKRouter(D, E, 2, init_scale=1.0),
            GroupedMLP(E, D, 8, init_scale=1.0),
            shared=MLP(D, 9, bias=True),
            mix=mix,
            **options,
        )


def budget_loss(*routings: Routing) -> Tensor:
    """The budget's loss as `AuxLosses` makes it; 0 where there is none."""
    if not any("conditional_budget" in (*r.losses, *r.deviations) for r in routings):
        return torch.zeros(())
    return AuxLosses(conditional_budget=1.0)(*routings)[0]


def shares_by_loop(mix: Mix, x: Tensor) -> list[tuple[float, float]]:
    """What of each token comes from experts and shared branch, written out."""
    found = []
    for row in x.tolist():
        weights, biases = mix.weight.tolist(), mix.bias.tolist()
        scores = [sum(a * b for a, b in zip(w, row, strict=True)) + b for w, b in zip(weights, biases, strict=True)]
        exps = [2.718281828459045**s for s in scores]
        if isinstance(mix, SoftmaxMix):
            found.append((exps[0] / (exps[0] + exps[1]), exps[1] / (exps[0] + exps[1])))
        else:
            found.append((exps[0] / (1 + exps[0]), 1 / (1 + exps[0])))
    return found


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("masked", [False, True])
def test_mix_equals_the_loop(name: str, masked: bool) -> None:
    moe = layer(MIXES[name]()).double()
    with torch.no_grad():
        moe.mix.bias.normal_()
    x = torch.randn(T, D, dtype=torch.float64)
    context = RoutingContext(mask=MASK) if masked else None
    hidden, routing = moe(x, context)
    routed, shared = moe_reference(x, routing, moe.experts.reference), moe.shared(x)
    shares = shares_by_loop(moe.mix, x)
    real = [t for t in range(T) if not masked or MASK[t]]
    for t in real:
        assert_close(hidden[t], shares[t][0] * routed[t] + shares[t][1] * shared[t], f"token {t}")
    mean = sum(shares[t][0] for t in real) / len(real)
    assert float(routing.statistics["routed_share"]) == pytest.approx(mean)
    if name.startswith("conditional"):
        assert ("conditional_budget" in routing.losses) == ("layer" in name)
        assert float(budget_loss(routing).detach()) == pytest.approx(abs(mean - 0.8))
        padding = [t for t in range(T) if t not in real]
        assert_close(hidden[padding], shared[padding], "padding takes the shared branch alone")
    assert {"load_balance", "router_z", "entropy"} <= {*routing.losses, *routing.statistics}


@pytest.mark.parametrize("name", MIXES)
def test_gradients(name: str) -> None:
    """float64 gradcheck of hidden states and losses, to input, both branches and the mix's parameters."""
    mix = MIXES[name]().double()
    x, routed, shared = (torch.randn(5, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    context = RoutingContext(mask=torch.tensor([True, True, False, True, True]))

    def run(x: Tensor, routed: Tensor, shared: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(mix, {"weight": weight, "bias": bias}, (x, routed, shared, context))
        return (out.hidden, *out.losses.values(), *(part.total for part in out.deviations.values()))

    weight, bias = (p.detach().clone().normal_().requires_grad_() for p in (mix.weight, mix.bias))
    assert gradcheck(run, (x, routed, shared, weight, bias))


@pytest.mark.parametrize("name", MIXES)
def test_content_of_padding_is_irrelevant(name: str) -> None:
    """NaN there reaches no real token, no loss and no gradient of mix, router and experts."""
    moe = layer(MIXES[name]())
    moe.shared = nn.Identity()  # whose own gradients NaN would spoil, as in any dense layer
    x, context = torch.randn(T, D), RoutingContext(mask=MASK)
    spoilt = x.masked_fill(~MASK[:, None], float("nan"))

    def real_part(x: Tensor) -> Any:
        hidden, routing = moe(x, context)
        return hidden[MASK].sum() + budget_loss(routing)

    found = []
    for inputs in (x, spoilt):
        moe.zero_grad()
        value = real_part(inputs)
        value.backward()
        gradients = {n: p.grad.clone() for n, p in moe.named_parameters()}
        found.append({"value": value.detach(), **gradients})
    assert_same(found[1], found[0], "padding matters")


@pytest.mark.parametrize("name", MIXES)
def test_nothing_but_padding(name: str) -> None:
    moe = layer(MIXES[name]())
    found = trace(partial(moe, context=RoutingContext(mask=torch.zeros(T, dtype=torch.bool))), moe, torch.randn(T, D))
    assert all(value.isfinite().all() for value in found.values())
    for kind in ("loss", "deviation"):
        assert not found.get(f"{kind} conditional_budget", torch.zeros(())).any()
    assert moe(torch.randn(0, D)).hidden.shape == (0, D)


@pytest.mark.parametrize("mix", [*MIXES.values(), lambda: ConditionalMix(D, gate_dropout=0.5), lambda: None])
def test_precision_copies_and_checkpointing(mix: Any) -> None:
    moe = layer(mix(), output_masking=ExpertOutputMasking(0.3))
    x = torch.randn(T, D)
    plain = trace(moe, moe, x)
    assert_same(
        trace(lambda x: checkpoint(moe, x, use_reentrant=False), moe, x), plain, "checkpointing changes the result"
    )
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert_same(trace(twin, twin, x), plain, "a copy computes something else")
    moe.eval()
    half = copy.deepcopy(moe).bfloat16()
    out = half(x.bfloat16())
    assert out.hidden.dtype == torch.bfloat16
    assert {loss.dtype for loss in out.routing.losses.values()} == {torch.float32}
    assert_close(out.hidden, half.float()(x.bfloat16().float()).hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe(x).hidden.dtype == torch.float32


def test_without_a_mix_branches_are_added() -> None:
    moe, x = layer(None), torch.randn(T, D)
    assert_close(moe(x).hidden, MoELayer(moe.router, moe.experts)(x).hidden + moe.shared(x))


def test_the_budget_is_weighed_like_any_loss() -> None:
    routing = layer(ConditionalMix(D)).forward(torch.randn(T, D)).routing
    total, terms = AuxLosses(conditional_budget=0.1, load_balance=0.0)(routing)
    assert float(total.detach()) == pytest.approx(0.1 * float(terms["conditional_budget"]))


def test_the_budget_is_of_all_layers_together() -> None:
    """fairseq: |sum of gates / number of tokens - p| over all layers; by layer the absolute values are summed."""
    layers = {}
    for scope in ("model", "layer"):
        for number, bias in enumerate((3.0, -1.0)):
            moe = layer(ConditionalMix(D, budget=0.6, scope=scope)).double()  # type: ignore[arg-type]
            with torch.no_grad():
                moe.mix.bias.fill_(bias)
            layers[scope, number] = moe
    long, short = torch.randn(30, D, dtype=torch.float64), torch.randn(10, D, dtype=torch.float64)
    context = RoutingContext(mask=torch.arange(30) < 25)

    def means(scope: str) -> tuple[list[Tensor], list[Routing]]:
        pairs = ((layers[scope, 0], long, context), (layers[scope, 1], short, None))
        gates = [torch.sigmoid(x @ moe.mix.weight.t() + moe.mix.bias)[:25] for moe, x, _ in pairs]
        return gates, [moe(x, what).routing for moe, x, what in pairs]

    (first, second), routings = means("model")
    total, terms = AuxLosses(conditional_budget=2.0, load_balance=0.0)(*routings)
    literal = ((first.sum() + second.sum()) / 35 - 0.6).abs()
    assert_close(total, 2.0 * literal)
    assert_close(terms["conditional_budget"], literal.detach())
    weights = [layers["model", number].mix.weight for number in range(2)]
    for found, expected in zip(
        torch.autograd.grad(total, weights), torch.autograd.grad(2.0 * literal, weights), strict=True
    ):
        assert_close(found, expected)
    (first, second), routings = means("layer")
    apart = (first.mean() - 0.6).abs() + (second.mean() - 0.6).abs()
    assert_close(AuxLosses(conditional_budget=1.0)(*routings)[0], apart)
    assert_close(AuxLosses(layers="mean", conditional_budget=1.0)(*routings)[0], apart / 2)
    # One layer above the budget and one below: together they keep it better than each alone.
    assert float(literal.detach()) < float(apart.detach()) / 2
    with pytest.raises(ValueError, match=r"'conditional_budgets'.*Did you mean 'conditional_budget'"):
        AuxLosses(conditional_budgets=1.0)(*means("model")[1])


def test_gate_dropout_is_of_whole_tokens_in_training() -> None:
    """Dropped tokens take the shared branch alone, the others keep their gate; the budget does not notice."""
    mix = ConditionalMix(2, gate_dropout=0.4)
    x, routed, shared = torch.randn(2000, 2), torch.ones(2000, 2), torch.zeros(2000, 2)
    gate = mix.eval()(x, routed, shared)
    trained = mix.train()(x, routed, shared)
    dropped = (trained.hidden == 0).all(1)
    assert 0.35 < float(dropped.float().mean()) < 0.45
    assert_close(trained.hidden[~dropped], gate.hidden[~dropped])
    assert_close(trained.deviations["conditional_budget"].total, gate.deviations["conditional_budget"].total)


def test_expert_output_masking() -> None:
    """Training: whole assignments are out, the rest is not scaled up. Evaluation: all times 1 - p. Losses stay."""
    router = routers.TopKRouter(D, E, 2, init_scale=1.0)
    routing, masking = router(torch.randn(2000, D)), ExpertOutputMasking(0.2)
    trained, evaluated = masking.train()(routing), masking.eval()(routing)
    out = trained.weight == 0
    assert 0.18 < float(out.float().mean()) < 0.22
    first, second = out.view(2, 2000)
    assert (first != second).any(), "one expert of a token may be masked and the other not"
    assert torch.equal(trained.weight[~out], routing.weight[~out])
    assert_close(evaluated.weight, 0.8 * routing.weight)
    for changed in (trained, evaluated):
        assert changed.losses is routing.losses
        assert torch.equal(changed.kept, routing.kept)


def test_expert_output_masking_masks_vectors_in_a_layer() -> None:
    """The routing that the layer returns is what it computed; the shared branch is not masked."""
    moe = layer(None, output_masking=ExpertOutputMasking(0.5))
    x = torch.randn(T, D)
    hidden, routing = moe(x)
    assert (routing.weight == 0).any()
    assert_close(hidden, moe_reference(x, routing, moe.experts.reference) + moe.shared(x))
    bare = MoELayer(moe.router, moe.experts).eval()
    assert_close(moe.eval()(x).hidden, 0.5 * bare(x).hidden + moe.shared(x))
    assert torch.equal(moe(x).hidden, moe(x).hidden)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConditionalMix(D, budget=1.2), r"budget must be in \[0, 1\]: got 1.2"),
        (lambda: ConditionalMix(D, scope="stack"), r"""scope must be "model" or "layer": got 'stack'"""),
        (lambda: ConditionalMix(D, gate_dropout=1.0), r"gate_dropout must be in \[0, 1\): got 1.0"),
        (lambda: ExpertOutputMasking(1.0), r"probability must be in \[0, 1\): got 1.0"),
        (
            lambda: MoELayer(routers.switch(D, E), GroupedMLP(E, D, 8), mix=SoftmaxMix(D)),
            "got SoftmaxMix and no `shared`",
        ),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
