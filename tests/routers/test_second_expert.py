"""Policies of later choices and ways to explore: what is picked, what is sent, how often, in training and after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.experts import GroupedMLP
from moekit.functional import gumbel_topk_scores
from moekit.functional.random_bits import jitter
from moekit.layer import MoELayer
from moekit.routers import (
    AllChoices,
    Exploration,
    InputDropout,
    InputJitter,
    RandomChoice,
    SampledChoice,
    SampledSoftmax,
    SecondExpertPolicy,
    ThresholdChoice,
    TopKRouter,
)
from moekit.routing import Capacity, RoutingContext
from moekit.testing import assert_close, seeded, some_mask

T, D, E = 36, 6, 4
PROBS = torch.tensor([0.5, 0.25, 0.2, 0.05])
DRAWS = 20_000
ERROR = 4 * (0.25 / DRAWS) ** 0.5  # four standard errors at most


def of_probs(repeat: int = DRAWS, **options: object) -> tuple[TopKRouter, Tensor]:
    """A router whose probabilities are `PROBS` for each of `repeat` equal tokens."""
    router = TopKRouter(E, E, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    return router, PROBS.log().expand(repeat, E)


def shares(expert: Tensor) -> Tensor:
    return torch.bincount(expert, minlength=E) / expert.numel()


def test_race_draws_from_the_distribution() -> None:
    with seeded(0):
        order = gumbel_topk_scores(PROBS.expand(DRAWS, E)).argsort(-1, descending=True)
    assert float((shares(order[:, 0]) - PROBS).abs().max()) < ERROR
    second = sum(PROBS[i] * (PROBS / (1 - PROBS[i])).scatter(0, torch.tensor(i), 0.0) for i in range(E))
    assert float((shares(order[:, 1]) - second).abs().max()) < ERROR


def test_race_never_draws_what_has_no_probability() -> None:
    probs = torch.tensor([0.0, 1e-30, 0.0, 0.0]).expand(1000, E)
    assert bool((gumbel_topk_scores(probs).argmax(-1) == 1).all())


def test_sampled_choice_keeps_the_best_and_draws_the_rest() -> None:
    router, x = of_probs(k=3, second_expert=SampledChoice())
    with seeded(1):
        routing = router.train()(x)
    expert = routing.expert.view(3, DRAWS)
    assert bool((expert[0] == 0).all())
    rest = PROBS[1:] / PROBS[1:].sum()
    assert float((shares(expert[1])[1:] - rest).abs().max()) < ERROR
    assert bool((expert.sort(0).values.diff(dim=0) > 0).all()), "the choices of a token must differ"
    assert_close(routing.weight, PROBS[routing.expert], "the weight is the clean probability")
    assert bool(routing.queued.all())
    assert torch.equal(router.eval()(x).expert.view(3, DRAWS)[:, 0], torch.tensor([0, 1, 2]))


def test_threshold_choice_is_the_same_in_evaluation() -> None:
    router = TopKRouter(D, E, 2, renormalise="before_drop", second_expert=ThresholdChoice(0.3), init_scale=9.0)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    trained, evaluated = router.train()(x), router.eval()(x)
    assert torch.equal(trained.queued, evaluated.queued)
    sent = trained.queued.view(2, T)[1]
    assert bool(sent.any())
    assert not bool(sent.all())
    assert torch.equal(sent, trained.weight.view(2, T)[1] > 0.3)


def test_all_choices_is_the_default() -> None:
    router = TopKRouter(D, E, 2)
    assert router.second_expert == AllChoices()
    assert bool(router.train()(torch.randn(T, D)).queued.all())


def test_a_policy_of_ones_own() -> None:
    class Never(SecondExpertPolicy):
        def send(self, weight: Tensor, *, training: bool) -> Tensor:
            return torch.zeros_like(weight, dtype=torch.bool)

    routing = TopKRouter(D, E, 2, second_expert=Never())(torch.randn(T, D))
    assert routing.queued.view(2, T).sum(1).tolist() == [T, 0]


@pytest.mark.parametrize("policy", [RandomChoice, ThresholdChoice])
@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_thresholds_are_checked(policy: type, threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"{policy.__name__}\.threshold must be in \(0, 1\]"):
        policy(threshold)


def test_jitter_is_on_the_routers_input_in_training_only() -> None:
    router = TopKRouter(D, E, exploration=InputJitter(0.3), init_scale=1.0)
    x = torch.randn(T, D)
    with seeded(4):
        noisy = jitter(x, 0.3)
    assert 0.69 < float((noisy / x).min()) < float((noisy / x).max()) < 1.31
    for training, expected in ((True, noisy), (False, x)):
        with seeded(4):
            routing = router.train(training)(x)
        probs = (expected @ router.weight.t()).softmax(-1)
        assert torch.equal(routing.expert, probs.argmax(-1))
        assert_close(routing.weight, probs.amax(-1))


def test_input_dropout_is_on_the_routers_input_in_training_only() -> None:
    router = TopKRouter(D, E, exploration=InputDropout(0.4), init_scale=1.0)
    x = torch.randn(T, D)
    with seeded(4):
        dropped = InputDropout(0.4).perturb(x)
    assert 0.2 < float((dropped == 0).float().mean()) < 0.6
    assert_close(dropped[dropped != 0], x[dropped != 0] / 0.6)
    for training, expected in ((True, dropped), (False, x)):
        with seeded(4):
            routing = router.train(training)(x)
        assert_close(routing.weight, (expected @ router.weight.t()).softmax(-1).amax(-1))


def test_sampled_softmax_draws_experts_and_keeps_their_weight() -> None:
    router, x = of_probs(exploration=SampledSoftmax())
    with seeded(5):
        routing = router.train()(x)
    assert float((shares(routing.expert) - PROBS).abs().max()) < ERROR
    assert_close(routing.weight, PROBS[routing.expert])
    assert bool((router.eval()(x).expert == 0).all())


def test_exploration_of_ones_own_ranks() -> None:
    class Backwards(Exploration):
        def rank(self, probs: Tensor) -> Tensor:
            return -probs

    router, x = of_probs(3, exploration=Backwards())
    assert router.train()(x).expert.tolist() == [3, 3, 3]
    assert router.eval()(x).expert.tolist() == [0, 0, 0]


@pytest.mark.parametrize("exploration", [InputJitter(0.5), InputDropout(0.5)])
def test_experts_see_the_clean_input(exploration: Exploration) -> None:
    """With one expert the weight is 1 and the layer must be the expert of x, noise or not."""
    layer = MoELayer(TopKRouter(D, 1, exploration=exploration), GroupedMLP(1, D, 8, init_scale=1.0)).train()
    x = torch.randn(T, D)
    assert_close(layer(x).hidden, layer.experts.reference(0, x))


@pytest.mark.parametrize("exploration", [InputJitter(0.3), InputDropout(0.3), SampledSoftmax()])
def test_the_inputs_are_left_alone(exploration: Exploration) -> None:
    """Noise and the clearing of padding are not in place."""
    router = TopKRouter(D, E, exploration=exploration, capacity=Capacity(train=1.0))
    x = torch.randn(T, D)
    before = x.clone()
    router(x, RoutingContext(mask=some_mask(T)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("epsilon", [1.0, -0.1, float("nan")])
def test_jitter_is_checked(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"InputJitter\.epsilon must be in \[0, 1\)"):
        InputJitter(epsilon)


def test_dropout_is_checked() -> None:
    with pytest.raises(ValueError, match=r"InputDropout\.probability must be in \[0, 1\): got 1.0"):
        InputDropout(1.0)
