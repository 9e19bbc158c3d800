"""Options of TopKRouter: renormalisation, how balance counts, jitter, evaluation, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moekit.experts import GroupedMLP
from moekit.functional import load_balance
from moekit.layer import MoELayer
from moekit.routers import (
    AllChoices,
    Balance,
    NoTokenLeftBehind,
    RandomChoice,
    SampledChoice,
    ThresholdChoice,
    TopKRouter,
    presets,
    topk,
)
from moekit.routing import Capacity, DecodingContext, RoutingContext
from moekit.testing import assert_close, skewed_tokens, some_mask

T, D, E = 36, 6, 4


def spread(router: TopKRouter) -> TopKRouter:
    """Scores that differ clearly, in float64."""
    router.double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(1)))
    return router


def tokens() -> Tensor:
    return skewed_tokens(T, D, dtype=torch.float64, seed=1) / 2


@pytest.mark.parametrize(
    ("renormalise", "padded", "k"), itertools.product(["none", "before_drop", "after_drop"], [False, True], [2, 3])
)
def test_renormalise(renormalise: str, padded: bool, k: int) -> None:
    """Weights of each token against its probabilities, with drops, random second choices and padding."""
    router = spread(
        TopKRouter(
            D,
            E,
            k,
            capacity=Capacity(train=0.5),
            renormalise=renormalise,  # type: ignore[arg-type]
            second_expert=RandomChoice(0.4),
        )
    ).train()
    x = tokens().requires_grad_()
    mask = some_mask(T) if padded else None
    routing = router(x, RoutingContext(mask=mask))
    weight, kept, expert = (getattr(routing, name).view(k, T).t() for name in ("weight", "kept", "expert"))
    assert len({int(n) for n in kept.sum(1)}) >= 3  # tokens that lost all, some, nothing
    probs = (x @ router.weight.t()).softmax(-1)
    for s in range(T):
        if mask is not None and not mask[s]:
            assert not kept[s].any()
            continue
        chosen = probs[s][expert[s]]
        if renormalise == "none":
            assert_close(weight[s], chosen)
        elif renormalise == "before_drop":
            assert_close(weight[s], chosen / chosen.sum())
        elif kept[s].any():
            assert_close(weight[s], chosen * kept[s] / chosen[kept[s]].sum())
            assert float(weight[s].detach().sum()) == pytest.approx(1.0)
        else:
            assert not weight[s].any()
    (grad,) = torch.autograd.grad((weight * kept * torch.cos(torch.arange(T * k).view(T, k))).sum(), x)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize(
    ("count", "when", "scope"),
    itertools.product(["first", "all"], ["before_drop", "after_drop"], ["batch", "sequence"]),
)
def test_balance_options(count: str, when: str, scope: str) -> None:
    """What the loss counts: first choices or all, what queued or what was kept, in the batch or in each sequence."""
    options = {"count": count, "when": when, "scope": scope}
    router = spread(
        TopKRouter(
            D,
            E,
            2,
            capacity=Capacity(train=0.5),
            second_expert=RandomChoice(0.4),
            balance=Balance(**options),  # type: ignore[arg-type]
        )
    ).train()
    mask, sequence = some_mask(T), torch.arange(T) // 9
    routing = router(tokens(), RoutingContext(mask=mask, sequence=sequence))
    assert int(routing.kept.sum()) < int(routing.queued.sum()) < 2 * int(mask.sum())
    choices = 1 if count == "first" else 2
    counted = routing.kept if when == "after_drop" else routing.queued
    probs = (tokens() @ router.weight.t()).softmax(-1)
    expected = load_balance(
        probs,
        routing.expert.view(2, T).t()[:, :choices],
        counted.view(2, T).t()[:, :choices],
        mask=mask,
        sequence=sequence,
        scope=scope,  # type: ignore[arg-type]
    )
    assert_close(routing.losses["load_balance"], expected)


def test_balance_options_differ() -> None:
    """The options above are not the same number on this batch, so the test above can fail."""
    losses = set()
    for count, when, scope in itertools.product(["first", "all"], ["before_drop", "after_drop"], ["batch", "sequence"]):
        balance = Balance(count=count, when=when, scope=scope)  # type: ignore[arg-type]
        router = spread(TopKRouter(D, E, 2, capacity=Capacity(train=0.5), balance=balance)).train()
        routing = router(tokens(), RoutingContext(sequence=torch.arange(T) // 9))
        losses.add(round(float(routing.losses["load_balance"].detach()), 9))
    assert len(losses) == 8


def test_evaluation_is_dropless_by_default_and_serves_by_position_with_a_capacity() -> None:
    x = tokens()
    assert spread(presets.zcode_m3(D, E)).eval()(x).capacity is None
    router = spread(presets.zcode_m3(D, E, eval_capacity_factor=0.5)).eval()
    routing = router(x)
    assert routing.capacity == 5  # ceil(0.5 * 36 / 4)
    for e in range(E):
        places = routing.position[routing.expert == e]
        assert places.tolist() == list(range(places.numel()))


DECODING: dict[str, tuple[bool, dict[str, object]]] = {
    "one choice": (True, {"k": 1}),
    "two": (True, {"k": 2}),
    "weights that sum to 1": (True, {"k": 2, "renormalise": "before_drop"}),
    "after drops": (True, {"k": 3, "renormalise": "after_drop", "capacity": Capacity(train=0.5)}),
    "a second choice by chance": (True, {"k": 2, "second_expert": RandomChoice(0.9)}),
    "one that is drawn": (True, {"k": 2, "second_expert": SampledChoice()}),
    "all": (True, {"k": 4, "second_expert": AllChoices()}),
    "a threshold": (False, {"k": 2, "second_expert": ThresholdChoice(0.3)}),
    "drops in evaluation": (False, {"k": 2, "capacity": Capacity(eval=0.5, minimum=1)}),
}


@pytest.mark.parametrize(("short", "options"), DECODING.values(), ids=DECODING)
def test_a_step_of_decoding_gives_the_same_list(
    short: bool, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By fewer operations where nothing is dropped or left out; with padding by those of every evaluation."""
    called = []
    form = topk.few_routing
    monkeypatch.setattr(topk, "few_routing", lambda *a: called.append(a) or form(*a))
    router = spread(TopKRouter(D, E, **options)).eval()
    x, mask = tokens(), some_mask(T)
    for masked in (None, mask):
        expected = router(x, RoutingContext(mask=masked))
        called.clear()
        with torch.no_grad():
            found = router(x, DecodingContext(mask=masked))
        assert bool(called) == (short and masked is None)
        for name in ("token", "expert", "position", "kept"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert_close(found.weight, expected.weight, "weights")
        assert (found.choices, found.capacity, found.all_kept) == (
            expected.choices,
            expected.capacity,
            expected.all_kept,
        )
    with torch.no_grad():
        router(tokens()[:0], DecodingContext())  # no token


def test_statistics() -> None:
    router = spread(TopKRouter(D, E))
    x, mask = tokens(), some_mask(T)
    for chosen in (None, mask):
        found = router(x, RoutingContext(mask=chosen)).statistics
        logits = x @ router.weight.t()
        logits = logits if chosen is None else logits[chosen]
        probs = logits.softmax(-1)
        assert_close(found["entropy"], -(probs * probs.log()).sum(-1).mean())
        assert_close(found["logsumexp"], logits.logsumexp(-1).mean())
        assert not any(value.requires_grad for value in found.values())


def test_initialisation() -> None:
    """Truncated normal of variance init_scale / dim, nothing beyond two (untruncated) standard deviations."""
    weight = TopKRouter(256, 64, init_scale=0.1).weight.detach()
    std = (0.1 / 256) ** 0.5
    assert float(weight.abs().max()) <= 2 * std
    assert float(weight.std()) == pytest.approx(0.88 * std, rel=0.03)  # truncation at two takes 12 %


@pytest.mark.parametrize("preset", [presets.switch, presets.gshard, presets.st_moe, presets.zcode_m3])
def test_presets_without_capacity_drop_nothing(preset: object) -> None:
    router = preset(D, E, capacity_factor=None).train()  # type: ignore[operator]
    routing = router(torch.randn(T, D))
    assert routing.capacity is None
    assert torch.equal(routing.kept, routing.queued)
    router.check_causal()


def test_causal_decoders_are_protected() -> None:
    for router in (
        presets.zcode_m3(D, E),
        presets.st_moe(D, E, batch_prioritised=True),
        TopKRouter(D, E, capacity=Capacity(eval=1.0, priority="probability")),
    ):
        layer = MoELayer(router, GroupedMLP(E, D, 4))
        with pytest.raises(ValueError, match="TopKRouter lets a token's route depend on later tokens"):
            layer.check_causal()
        router.allow_future = True
        layer.check_causal()
    for router in (
        presets.switch(D, E),
        presets.gshard(D, E),
        presets.st_moe(D, E),
        TopKRouter(D, E, capacity=Capacity(eval=1.0, priority="random")),  # random acts in training only
    ):
        router.check_causal()
    presets.zcode_m3(D, E, allow_future=True).check_causal()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be between 1 and num_experts: got k=0 and num_experts=4"),
        ({"k": 5}, "k must be between 1 and num_experts: got k=5"),
        ({"renormalise": "later"}, 'renormalise must be "none", "before_drop" or "after_drop": got \'later\''),
        ({"renormalise": "before_drop"}, "renormalise='before_drop' with k=1 makes every weight exactly 1"),
        ({"renormalise": "after_drop"}, "renormalise='after_drop' with k=1 makes every weight exactly 1"),
        (
            {"overflow": NoTokenLeftBehind(), "balance": Balance(scope="global")},
            "with overflow it cannot count first tries: got when='before_drop'",
        ),
    ],
)
def test_router_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKRouter(D, E, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["count", "when", "scope"])
def test_balance_refuses(field: str) -> None:
    with pytest.raises(ValueError, match=f"Balance.{field} must be one of .*: got 'frist'"):
        Balance(**{field: "frist"})


def test_sequence_scope_needs_sequences() -> None:
    router = TopKRouter(D, E, balance=Balance(scope="sequence"))
    with pytest.raises(ValueError, match="needs to know which sequence"):
        router(torch.randn(T, D))


def test_prints_what_it_is() -> None:
    shown = repr(TopKRouter(D, E, 2))
    assert "dim=6, num_experts=4, k=2, scorer=LinearScorer(init_scale=0.1), capacity=Capacity(train=None" in shown
