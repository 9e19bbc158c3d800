"""Scores of what a model writes, by direction, over any number of processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class AnswerScore(Metric, ABC):
    """Corpus scores of written answers against references, for each direction.

    A subclass counts (`count`) into its own states, which are sums over batches and processes, and makes scores of
    them (`summary`): no strings are gathered. Strings must be plain text: detokenized, without special tokens.

    Args:
        directions: names such as ``"en-de"``; `update` refuses others.
        tokenize: how BLEU splits text into words, of scores that have it.

    Raises:
        ValueError: no directions, or one twice.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    sentences: Tensor

    def __init__(self, directions: Sequence[str], *, tokenize: str = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenize = tokenize
        names = tuple(str(d) for d in directions)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{type(self).__name__} needs one or more different directions: got {list(names)}.")
        self.directions = names
        self.add_state("sentences", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, direction: str, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Count one batch of one direction.

        Raises:
            ValueError: an unknown direction, or different numbers of hypotheses and references.
        """
        direction = str(direction)
        if direction not in self.directions:
            raise ValueError(
                f"direction must be one of {list(self.directions)}: got {direction!r}. Name every direction when "
                f"making {type(self).__name__}."
            )
        if len(hypotheses) != len(references):
            raise ValueError(
                f"Each hypothesis needs its reference: got {len(hypotheses)} hypotheses and {len(references)} "
                f"references for {direction}."
            )
        if not hypotheses:
            return
        row = self.directions.index(direction)
        self.count(row, hypotheses, references)
        self.sentences[row] += len(hypotheses)

    @abstractmethod
    def count(self, row: int, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add one batch to row `row` of the states."""

    @abstractmethod
    def compute(self) -> dict[str, dict[str, Any]]:
        """The scores in the form of summary.json: for each by name what `summary` makes."""

    def log_values(self) -> dict[str, float]:
        """The scores as a flat dictionary for `log_dict`: ``bleu/en-de``, ..., ``bleu/average``, ``chrf/...``."""
        values: dict[str, float] = {}
        for name, scores in self.compute().items():
            values |= {f"{name}/{direction}": score for direction, score in scores["directions"].items()}
            if scores["average"] is not None:
                values[f"{name}/average"] = scores["average"]
        return values

    def summary(self, scores: Sequence[float], signature: str) -> dict[str, Any]:
        """One score of every direction as ``{"average", "signature", "directions": {"en-de": ...}}``.

        Directions without a sentence are absent; the average is over the others, None where there is none.
        """
        sentences = self.sentences.tolist()  # host read: once for a test
        found = {d: s for d, s, seen in zip(self.directions, scores, sentences, strict=True) if seen}
        average = sum(found.values()) / len(found) if found else None
        return {"average": average, "signature": signature, "directions": found}
