"""Perplexity of tokens, by task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.training.metrics.wide import WideMetric


class TokenPerplexity(WideMetric):
    """exp(sum of negative log-likelihoods / number of tokens) for each task.

    Unlike a mean of batch means, it does not depend on how tokens were batched or spread over processes.

    Args:
        tasks: names such as ``"my_task"``; `update` refuses others.

    Raises:
        ValueError: no task, or one twice.

    Example:
        >>> perplexity = TokenPerplexity(["my_task"])
        >>> perplexity.update("my_task", torch.tensor(6.0), torch.tensor(3))
        >>> round(perplexity.compute()["my_task"], 3)
        7.389
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    nll: Tensor
    tokens: Tensor

    def __init__(self, tasks: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"TokenPerplexity needs one or more different tasks: got {list(tasks)}.")
        self.tasks = tuple(tasks)
        # float64: a float32 sum stops growing after some ten million tokens.
        self.add_state("nll", torch.zeros(len(tasks), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(len(tasks), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, task: str, nll: Tensor | float, tokens: Tensor | int) -> None:
        """Add `nll`, the sum (not mean) of negative log-likelihoods in nats, over `tokens` predicted tokens.

        Raises:
            ValueError: an unknown task.
        """
        if task not in self.tasks:
            raise ValueError(f"task must be one of {list(self.tasks)}: got {task!r}. Name it when making the metric.")
        row = self.tasks.index(task)
        self.nll[row] += torch.as_tensor(nll, device=self.nll.device).detach().to(torch.float64)
        self.tokens[row] += torch.as_tensor(tokens, device=self.tokens.device).detach().to(torch.int64)

    def compute(self) -> dict[str, float]:
        """Perplexity by task; tasks without a token are absent, and an overflow is infinity."""
        values = {}
        sums = torch.stack([self.nll, self.tokens.to(self.nll)], 1).tolist()  # host read: once for an evaluation
        for task, (nll, tokens) in zip(self.tasks, sums, strict=True):
            if tokens:
                mean = nll / tokens
                values[task] = math.exp(mean) if mean < 700 else (mean if math.isnan(mean) else math.inf)
        return values
