"""A router's scorer is a part of it, and its parameters are the router's own: the names of checkpoints stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moekit import routers
from moekit.routers import CosineScorer, ExpertScorer, LinearScorer, ScoredRouter, TaskScorer, TopKRouter
from moekit.routing import Capacity, RoutingContext
from moekit.testing import assert_close

D, E, T = 6, 4, 24
TASK = RoutingContext(task=torch.arange(T) % 3)

LINEAR = {"weight": (E, D)}
COSINE = {"weight": (E, 3), "projection": (3, D), "log_temperature": ()}
TASKS = {"scores": (3, E)}
# The state of every router as moekit 0.1.0 saved it.
SAVED: dict[str, tuple[Callable[[], ScoredRouter], dict[str, tuple[int, ...]]]] = {
    "TopKRouter": (lambda: TopKRouter(D, E), LINEAR),
    "CosineRouter": (lambda: routers.CosineRouter(D, E, projected_dim=3), COSINE),
    "TaskRouter": (lambda: routers.TaskRouter(D, E, num_tasks=3), TASKS),
    "ExpertChoiceRouter": (lambda: routers.ExpertChoiceRouter(D, E), LINEAR),
    "SinkhornRouter": (lambda: routers.SinkhornRouter(D, E), LINEAR),
    "ReLURouter": (lambda: routers.ReLURouter(D, E, 1), {**LINEAR, "coefficient.exponent": ()}),
    "LossFreeRouter": (lambda: routers.LossFreeRouter(D, E, 2), {**LINEAR, "bias": (E,)}),
    "DenseToSparseRouter": (lambda: routers.dense_to_sparse(D, E), {**LINEAR, "step": ()}),
}


def tokens() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SAVED)
def test_old_checkpoints_load(name: str) -> None:
    """Strictly, by the names and shapes that they have; and the values arrive."""
    make, shapes = SAVED[name]
    router = make()
    assert {key: tuple(value.shape) for key, value in router.state_dict().items()} == shapes
    saved = {key: torch.full_like(value, 2) for key, value in router.state_dict().items()}
    router.load_state_dict(saved)
    assert all(torch.equal(value, saved[key]) for key, value in router.state_dict().items())


SCORERS = [(LinearScorer(), LINEAR), (CosineScorer(3), COSINE), (TaskScorer(3), TASKS)]
MAKE: dict[str, Callable[[ExpertScorer], ScoredRouter]] = {
    "TopKRouter": lambda scorer: TopKRouter(D, E, 2, scorer=scorer),
    "ExpertChoiceRouter": lambda scorer: routers.ExpertChoiceRouter(D, E, scorer=scorer),
    "SinkhornRouter": lambda scorer: routers.SinkhornRouter(D, E, 2, scorer=scorer),
    "ReLURouter": lambda scorer: routers.ReLURouter(D, E, 2, scorer=scorer),
    "LossFreeRouter": lambda scorer: routers.LossFreeRouter(D, E, 2, scorer=scorer),
    "DenseToSparseRouter": lambda scorer: routers.DenseToSparseRouter(
        D, E, routers.LinearDecay(1.0, 0.5, 10), scorer=scorer
    ),
}


@pytest.mark.parametrize(("scorer", "shapes"), SCORERS, ids=["linear", "cosine", "task"])
@pytest.mark.parametrize("name", MAKE)
def test_every_router_takes_every_scorer(name: str, scorer: ExpertScorer, shapes: dict[str, tuple[int, ...]]) -> None:
    router = MAKE[name](scorer)
    assert {key: tuple(value.shape) for key, value in router.named_parameters()} == shapes
    logits = router.logits(tokens(), TASK)
    assert (logits.shape, logits.dtype) == ((T, E), torch.float32)
    assert router.expert_dims is not None
    for key, dim in router.expert_dims.items():
        assert router.state_dict()[key].shape[dim] == E
    router(tokens(), TASK).weight.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in router.parameters())


@pytest.mark.parametrize(
    ("thin", "composed"),
    [
        (
            lambda: routers.CosineRouter(D, E, 2, projected_dim=3, temperature=0.2, renormalise="before_drop"),
            lambda: TopKRouter(D, E, 2, scorer=CosineScorer(3, 0.2), renormalise="before_drop"),
        ),
        (
            lambda: routers.TaskRouter(D, E, 2, num_tasks=3, capacity=Capacity(train=0.6)),
            lambda: TopKRouter(D, E, 2, scorer=TaskScorer(3), capacity=Capacity(train=0.6)),
        ),
    ],
    ids=["cosine", "task"],
)
def test_routers_named_after_a_scorer_are_top_k_with_it(
    thin: Callable[[], TopKRouter], composed: Callable[[], TopKRouter]
) -> None:
    found = []
    for make in (thin, composed):
        torch.manual_seed(0)
        routing = make()(tokens(), TASK)
        found.append([routing.expert, routing.weight, routing.position, *routing.losses.values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_scores_of_a_task_are_its_row_and_zero_at_padding() -> None:
    router, mask = TopKRouter(D, E, scorer=TaskScorer(3)), torch.arange(T) < 20
    logits = router.logits(tokens(), RoutingContext(task=TASK.task, mask=mask))
    assert_close(logits[:20], router.scores[TASK.task[:20]])  # type: ignore[index]
    assert not logits[20:].any()


def test_first_values_have_one_owner() -> None:
    assert LinearScorer(2.0) == TopKRouter(D, E, init_scale=2.0).scorer
    with pytest.raises(ValueError, match=r"init_scale is of the linear scorer: got init_scale=2.0 and TaskScorer"):
        TopKRouter(D, E, scorer=TaskScorer(3), init_scale=2.0)
