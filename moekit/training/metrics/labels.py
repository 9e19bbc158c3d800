"""How often each answer is right, by task: what one gets who always says the most frequent one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class LabelCounts(Metric):
    """The share of the most frequent label of each task: the accuracy of always giving that answer.

    Args:
        tasks: their names.
        classes: number of labels; those of a task are below it.

    Example:
        >>> labels = LabelCounts(["my_task"], 10)
        >>> labels.update("my_task", torch.tensor([3, 7, 3, 3]))
        >>> labels.compute()
        {'my_task': 0.75}
    """

    full_state_update = False
    is_differentiable = False

    counts: Tensor

    def __init__(self, tasks: Sequence[str], classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tasks = tuple(tasks)
        self.add_state("counts", torch.zeros(len(tasks), classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, task: str, labels: Tensor) -> None:
        """Count labels Int64[N] of a task."""
        self.counts[self.tasks.index(task)].scatter_add_(0, labels, torch.ones_like(labels))

    def compute(self) -> dict[str, float]:
        """The share by task; tasks without a label are absent."""
        found = torch.stack([self.counts.amax(1), self.counts.sum(1)], 1).tolist()  # host read: once for an evaluation
        return {task: most / total for task, (most, total) in zip(self.tasks, found, strict=True) if total}
