"""Task-level routing: the task or language of a token chooses its experts, not the token itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moekit.routers.hash import TableRouter
from moekit.routers.hash_keys import known_ids
from moekit.routers.queueing import clear_padding
from moekit.routers.scorers import ExpertScorer
from moekit.routers.topk import TopKRouter
from moekit.routing import Capacity, Router, Routing, RoutingContext


@dataclass(frozen=True)
class TaskScorer(ExpertScorer):
    """logits = table[task]: learned scores of the task, the same for all of its tokens. Hidden states are not read.

    Attributes:
        num_tasks: ids in `RoutingContext.task` are 0..num_tasks-1.

    Raises:
        ValueError: if `num_tasks` is less than 1; in the call, if `RoutingContext.task` is missing, or on a CPU if it
            holds an id out of range.

    Source: arXiv:2110.03742 section 3.2. Differs: the paper scores a learned embedding of the task by a linear gate;
        a table of scores is the same function of the task. It starts as N(0, 1), so that tasks begin apart (ours).
    """

    num_tasks: int
    expert_dims: ClassVar[Mapping[str, int]] = {"scores": 1}
    looks_up: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_tasks(self.num_tasks)

    def shapes(self, dim: int, num_experts: int) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return {"scores": (self.num_tasks, num_experts)}

    def draw_(self, parameters: Mapping[str, Tensor]) -> None:  # noqa: D102
        nn.init.normal_(parameters["scores"])

    def __call__(self, x: Tensor, context: RoutingContext, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        scores = parameters["scores"]
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return clear_padding(wide[_tasks(self, context, self.num_tasks)], context.mask)


class TaskRouter(TopKRouter):
    """`TopKRouter` with a `TaskScorer`: all tokens of a task share their experts.

    After training the experts of a task are a small dense model that can be cut out and served alone.

    Args:
        num_tasks: number of tasks; ids in `RoutingContext.task` are 0..num_tasks-1.
        **options: those of `TopKRouter`, as are `dim`, `num_experts` and `k`. The paper's top-2 gate is GShard's,
            ``renormalise="before_drop"``.

    Raises:
        ValueError: see `TaskScorer` and `TopKRouter`.

    Source: arXiv:2110.03742 section 3.2.
    """

    def __init__(self, dim: int, num_experts: int, k: int = 1, *, num_tasks: int, **options: Any) -> None:
        super().__init__(dim, num_experts, k, scorer=TaskScorer(num_tasks), **options)


class TaskTableRouter(TableRouter):
    """A fixed table from task to expert; weight 1, nothing learned: an expert per language, or per family.

    Args:
        num_experts: E.
        table: the expert of each task; ids in `RoutingContext.task` are 0..len(table)-1.
        capacity: slots per expert; dropless by default.
        allow_future: accept priorities that look at later tokens in a causal decoder.

    Raises:
        ValueError: if the table is empty or names an expert that does not exist, or `capacity` is a
            `SequenceCapacity`; in forward, if `RoutingContext.task` is missing, or on a CPU if it holds an id out of
            range.

    Source: arXiv:2110.03742 section 3.2 (the task as the key of routing); the fixed table is ours.
    """

    expert_dims: ClassVar[Mapping[str, int]] = {}
    shown = ("num_experts", "num_tasks", "capacity")

    def __init__(
        self,
        num_experts: int,
        table: Sequence[int],
        *,
        capacity: Capacity | None = None,
        allow_future: bool = False,
    ) -> None:
        _check_tasks(len(table))
        wrong = [expert for expert in table if not 0 <= expert < num_experts]
        if wrong:
            raise ValueError(f"table must name experts in 0..{num_experts - 1}: got {wrong[0]}.")
        given = torch.tensor(table, dtype=torch.int64, device="cpu")
        super().__init__(num_experts, given, capacity, looks_ahead=False, allow_future=allow_future)
        self.num_tasks = len(table)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        context = context or RoutingContext()
        return self.routing(self.table[_tasks(self, context, self.num_tasks)], context)


def _check_tasks(num_tasks: int) -> None:
    if num_tasks < 1:
        raise ValueError(f"a task router needs at least one task: got {num_tasks}.")


def _tasks(chooser: ExpertScorer | Router, context: RoutingContext, num_tasks: int) -> Tensor:
    """Int64[T]: task ids, 0 where there is padding, which may hold anything."""
    name = type(chooser).__name__
    if context.task is None:
        raise ValueError(
            f"{name} chooses by task, and RoutingContext.task is None. Pass one id per token (task or language), for "
            "example RoutingContext(task=ids)."
        )
    return known_ids(
        context.task,
        context.mask,
        num_tasks,
        f"{name} knows tasks 0..{num_tasks - 1}: RoutingContext.task holds {{}}. Build the router with as many tasks "
        "as the data has.",
    )
