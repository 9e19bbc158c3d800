"""Cosine scores, and routing by task: formulas, gradients, errors. And gradcheck of all routers of this kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moekit.routers import (
    Balance,
    CosineRouter,
    ExpertChoiceRouter,
    SinkhornRouter,
    TaskRouter,
    TaskTableRouter,
    TopKRouter,
)
from moekit.routers.cosine import temperature_of
from moekit.routing import Capacity, Router, RoutingContext
from moekit.testing import assert_close, seeded, skewed_tokens, some_mask

T, D, E, TASKS = 24, 6, 4, 3


def tokens() -> Tensor:
    return skewed_tokens(T, D, dtype=torch.float64, seed=1) / 2


def tasks() -> Tensor:
    return torch.arange(T) * 7 % TASKS


@torch.no_grad()
def test_cosine_logits_are_the_formula() -> None:
    router = CosineRouter(D, E, projected_dim=3, temperature=0.2).double()
    logits = router.logits(tokens())
    for s in range(T):
        low = [sum(float(w) * float(v) for w, v in zip(row, tokens()[s], strict=True)) for row in router.projection]
        for e in range(E):
            dot = sum(a * float(b) for a, b in zip(low, router.weight[e], strict=True))
            norms = math.sqrt(sum(a * a for a in low)) * math.sqrt(sum(float(b) ** 2 for b in router.weight[e]))
            assert float(logits[s, e]) == pytest.approx(dot / norms / 0.2, rel=1e-6)


def test_norms_have_no_say() -> None:
    router = CosineRouter(D, E).double()
    logits = router.logits(tokens())
    assert_close(router.logits(7 * tokens()), logits)
    with torch.no_grad():
        router.weight.mul_(torch.tensor([[2.0], [0.5], [9.0], [1.0]]))
    assert_close(router.logits(tokens()), logits)
    assert float(logits.detach().abs().max()) <= 1 / 0.5


def test_the_temperature_is_learned_and_has_a_floor() -> None:
    router = CosineRouter(D, E, temperature=0.3)
    assert float(temperature_of(router.log_temperature.detach())) == pytest.approx(0.3)
    router(tokens().float()).weight.sum().backward()
    assert router.log_temperature.grad is not None
    assert float(router.log_temperature.grad) != 0
    with torch.no_grad():
        router.log_temperature.fill_(-50.0)
    assert float(temperature_of(router.log_temperature.detach())) == pytest.approx(0.01)


def test_cosine_starts_orthogonal() -> None:
    router = CosineRouter(64, 16)
    assert router.projection.shape == (8, 64)
    few = CosineRouter(64, 4)
    assert_close(few.weight @ few.weight.t(), 0.32**2 * torch.eye(4))
    assert CosineRouter(64, 32).projection.shape == (16, 64)


def test_after_the_logits_cosine_is_top_k() -> None:
    router = CosineRouter(D, E, 2, renormalise="before_drop", capacity=Capacity(train=0.6)).double().train()
    twin = TopKRouter(E, E, 2, renormalise="before_drop", capacity=Capacity(train=0.6)).double().train()
    with torch.no_grad():
        twin.weight.copy_(torch.eye(E))
    context = RoutingContext(mask=some_mask(T))
    found, expected = router(tokens(), context), twin(router.logits(tokens()), context)
    for name in ("expert", "weight", "position", "kept"):
        assert_close(getattr(found, name)[found.queued], getattr(expected, name)[found.queued], name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projected_dim": 0}, "projected_dim must be at least 1, or None: got 0"),
        ({"temperature": 0.001}, "temperature must be at least 0.01"),
    ],
)
def test_cosine_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosineRouter(D, E, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("renormalise", ["none", "before_drop"])
def test_task_router_equals_the_loop(renormalise: str) -> None:
    router = TaskRouter(D, E, 2, num_tasks=TASKS, renormalise=renormalise).double()  # type: ignore[arg-type]
    mask = some_mask(T)
    routing = router(tokens(), RoutingContext(task=tasks(), mask=mask))
    terms, count = [], [0] * E
    mean = torch.zeros(E, dtype=torch.float64)
    for s in mask.nonzero().flatten().tolist():
        probs = router.scores[int(tasks()[s])].softmax(-1)
        best = sorted(range(E), key=lambda e, p=probs: -p[e].item())[:2]
        assert routing.expert.view(2, T)[:, s].tolist() == best
        weight = probs[best] if renormalise == "none" else probs[best] / probs[best].sum()
        assert_close(routing.weight.view(2, T)[:, s], weight)
        terms.append((weight * torch.tensor([1.0 + s, 2.0 - s])).sum())
        count[best[0]] += 1
        mean = mean + probs / int(mask.sum())
    assert_close(
        routing.losses["load_balance"], (E * torch.tensor(count, dtype=torch.float64) / int(mask.sum()) * mean).sum()
    )
    assert torch.equal(routing.queued, mask.repeat(2))
    place = torch.stack([1.0 + torch.arange(T), 2.0 - torch.arange(T)])
    ours = (routing.weight.view(2, T) * place * mask).sum()
    assert_close(
        torch.autograd.grad(ours, router.scores)[0], torch.autograd.grad(torch.stack(terms).sum(), router.scores)[0]
    )


def test_tokens_of_a_task_share_their_experts() -> None:
    expert = TaskRouter(D, E, num_tasks=TASKS)(tokens().float(), RoutingContext(task=tasks())).expert
    assert all(expert[tasks() == task].unique().numel() == 1 for task in range(TASKS))


def test_task_table() -> None:
    router = TaskTableRouter(E, [3, 0, 3])
    routing = router(tokens(), RoutingContext(task=tasks()))
    assert routing.expert.tolist() == [[3, 0, 3][task] for task in tasks().tolist()]
    assert bool((routing.weight == 1).all())
    assert not routing.losses
    other = TaskTableRouter(E, [0, 0, 0])
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(tokens(), RoutingContext(task=tasks())).expert, routing.expert)
    assert not list(router.parameters())


@pytest.mark.parametrize(
    "build",
    [lambda: TaskRouter(D, E, num_tasks=TASKS), lambda: TaskTableRouter(E, [0, 1, 2])],
    ids=["learned", "table"],
)
def test_tasks_are_needed_and_checked(build: Callable[[], Router]) -> None:
    router = build()
    name = type(getattr(router, "scorer", router)).__name__
    for context in (None, RoutingContext()):
        with pytest.raises(ValueError, match=rf"{name} chooses by task, and RoutingContext\.task is None"):
            router(tokens(), context)
    for wrong in (-1, 3):
        ids = tasks()
        ids[5] = wrong
        with pytest.raises(ValueError, match=rf"{name} knows tasks 0\.\.2: RoutingContext\.task holds {wrong}\."):
            router(tokens(), RoutingContext(task=ids))
        router(tokens(), RoutingContext(task=ids, mask=torch.arange(T) != 5))  # padding may hold any id


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TaskTableRouter(E, []), "needs at least one task: got 0"),
        (lambda: TaskTableRouter(E, [0, 4]), r"table must name experts in 0\.\.3: got 4"),
        (lambda: TaskRouter(D, E, num_tasks=0), "needs at least one task: got 0"),
        (lambda: TaskRouter(D, E, num_tasks=2, renormalise="before_drop"), "makes every weight exactly 1"),
    ],
)
def test_task_routers_refuse(build: Callable[[], Router], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: TopKRouter(D, E, 2, renormalise="after_drop", capacity=Capacity(train=0.6), init_scale=9.0),
        lambda: TopKRouter(D, E, 3, renormalise="before_drop", balance=Balance(count="all"), init_scale=9.0),
        lambda: CosineRouter(D, E, 2, projected_dim=3),
        lambda: ExpertChoiceRouter(D, E, init_scale=9.0),
        lambda: SinkhornRouter(D, E, 2, init_scale=9.0),
        lambda: SinkhornRouter(D, E, activation="sigmoid", init_scale=9.0),
        lambda: TaskRouter(D, E, 2, num_tasks=TASKS, renormalise="before_drop"),
    ],
    ids=["after_drop", "before_drop", "cosine", "expert choice", "sinkhorn", "sinkhorn sigmoid", "task"],
)
def test_gradcheck(build: Callable[[], Router]) -> None:
    """Weights and losses against finite differences in float64, to the tokens and to every parameter."""
    with seeded(3):
        router = build().double().train()
    names = [name for name, _ in router.named_parameters()]
    context = RoutingContext(mask=some_mask(T), task=tasks())

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x, context))
        return (routing.weight * routing.kept, *routing.losses.values())

    inputs = (tokens().requires_grad_(not isinstance(router, TaskRouter)), *router.parameters())
    assert torch.autograd.gradcheck(call, inputs)
