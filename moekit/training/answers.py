"""What a model writes in evaluations: scored, beside what copying would score, and kept for whoever reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from moekit.data.batch import Batch
from moekit.tasks.head import Head
from moekit.tasks.score import AnswerScore

Row = tuple[str, str, str]
"""What was given, what is right, and what the model writes."""


class Translate(Protocol):
    """Turns a batch into written answers; `moekit.inference.Translator` does."""

    def batch(self, batch: Batch) -> list[str]:
        """One hypothesis for every row of ``batch.source``."""

    def text(self, ids: Tensor) -> list[str]:
        """The sentences of Int64[B, T] token ids."""


class Write(Protocol):
    """Writes samples for tasks whose answers are not scored; `moekit.inference.completer.Completer` does."""

    def samples(self, batch: Batch, rows: int) -> list[Row]:
        """What was given, what is right and what the model writes, for the first `rows` rows."""


class Answers(nn.Module):
    """The written answers to the batches of an evaluation.

    Args:
        heads: the tasks; those with scores are scored, the others have samples alone.
        directions: directions whose answers are scored; without any nothing is.
        tokenize: how BLEU splits text into words: see `moekit.tasks.TranslationScore`.
        samples: answers of each task and direction (or language) that are kept for a report.
        valid: whether answers are scored in validations of training too.

    Attributes:
        translate: what writes the answers that are scored; to be set before the test.
        write: what writes samples for other tasks; None = nobody does.
        originals: gives sources and references of a direction, by their numbers, as they were before tokenization; None
            = they are read from the batch.
        samples: those that were kept, by the names of `moekit.runs.record.Sample`.
        written: number of the sentence, reference and answer, by task and direction: all that a test scored.
        scores: what the answers of the last test scored, by the name of the score; None = there was no test.
        copied: what copying the source would score, by the name of the score.

    Raises:
        ValueError: two heads have the same score.
    """

    def __init__(
        self, heads: Sequence[Head], directions: Sequence[str], *, tokenize: str, samples: int, valid: bool
    ) -> None:
        super().__init__()
        scored = [head for head in heads if head.scores]
        if len({name for head in scored for name in head.scores}) < sum(len(head.scores) for head in scored):
            raise ValueError(f"heads must have different scores: got {[list(head.scores) for head in scored]}.")
        kinds = {head.task: head.make_score for head in scored if directions}

        def metrics() -> nn.ModuleDict:
            return nn.ModuleDict({task: make(directions, tokenize=tokenize) for task, make in kinds.items()})

        self._test, self._copies = metrics(), metrics()
        self._valid = metrics() if valid else nn.ModuleDict()
        self._wanted = samples
        self.translate: Translate | None = None
        self.write: Write | None = None
        self.originals: Callable[[str, list[int]], tuple[list[str], list[str]]] | None = None
        self.samples: list[dict[str, str]] = []
        self.written: dict[str, dict[str, list[tuple[int, str, str]]]] = {}
        self.scores: dict[str, Any] | None = None
        self.copied: dict[str, Any] = {}

    @property
    def scored(self) -> tuple[str, ...]:
        """The tasks whose answers a test scores."""
        return tuple(self._test)

    @property
    def scored_in_training(self) -> tuple[str, ...]:
        """The tasks whose answers validations of training score."""
        return tuple(self._valid)

    def validate(self, batch: Batch) -> None:
        """Write the answers to a batch of validation, and count them.

        Raises:
            ValueError: `translate` is not set.
        """
        self._score(batch, cast(AnswerScore, self._valid[batch.task]))

    def test(self, batch: Batch) -> None:
        """Write the answers to a batch of the test, count them, and keep them all and some samples.

        Raises:
            ValueError: `translate` is not set, or there are no directions.
        """
        rows = self._score(batch, cast(AnswerScore | None, dict(self._test.items()).get(batch.task)), keep=True)
        copies = cast(AnswerScore, self._copies[batch.task])
        copies.update(cast(str, batch.direction), [row[0] for row in rows], [row[1] for row in rows])
        self._keep(batch, rows[: self._missing(batch)])

    def sample(self, batch: Batch) -> None:
        """Keep samples of a batch whose answers are not scored, if there is somebody who writes them."""
        if self.write is not None:
            self._keep(batch, self.write.samples(batch, self._missing(batch)))

    def end_validation(self) -> dict[str, float]:
        """The scores of a validation by the names that they are logged by; it forgets what it counted."""
        return _logged(self._valid)

    def end_test(self) -> dict[str, float]:
        """The scores of a test by the names that they are logged by; it forgets what it counted.

        Of several processes it is called by all, once `share` has brought together what they wrote.
        """
        for metric in _metrics(self._test):
            self.scores = {**(self.scores or {}), **metric.compute()}
        for metric in _metrics(self._copies):
            scores = metric.compute().items()
            self.copied |= {name: {key: found[key] for key in ("average", "directions")} for name, found in scores}
            metric.reset()
        return _logged(self._test)

    def share(self, world_size: int) -> None:
        """Bring together what all processes have written, each sentence once and in the order of the text."""
        parts: list[Any] = [self.written]
        if world_size > 1:
            parts = [None] * world_size
            torch.distributed.all_gather_object(parts, self.written)
        found: dict[str, dict[str, dict[int, tuple[int, str, str]]]] = {}
        for part in parts:
            for task, directions in part.items():
                for direction, rows in directions.items():
                    found.setdefault(task, {}).setdefault(direction, {}).update({row[0]: row for row in rows})
        self.written = {
            task: {direction: [rows[n] for n in sorted(rows)] for direction, rows in sorted(directions.items())}
            for task, directions in found.items()
        }

    def _score(self, batch: Batch, score: AnswerScore | None, *, keep: bool = False) -> list[Row]:
        """Write the answers to a batch, count them and maybe keep them."""
        if self.translate is None or score is None:
            raise ValueError(
                "the test scores what is written, so MultitaskModule needs `directions` and `translate`: set "
                "module.answers.translate = moekit.inference.Translator(backbone, tokenizer)."
            )
        assert batch.target is not None, "batches of pairs have a target"
        assert batch.direction is not None, "evaluation batches hold one direction each"
        hypotheses = self.translate.batch(batch)
        if self.originals is not None and batch.index is not None:
            numbers = batch.index.tolist()  # host read: which sentences they are
            sources, references = self.originals(batch.direction, numbers)
            if keep:
                rows = self.written.setdefault(batch.task, {}).setdefault(batch.direction, [])
                rows += zip(numbers, references, hypotheses, strict=True)
        else:
            sources, references = self.translate.text(batch.source), self.translate.text(batch.target)
        score.update(batch.direction, hypotheses, references)
        return list(zip(sources, references, hypotheses, strict=True))

    def _missing(self, batch: Batch) -> int:
        """How many more samples of this task and direction or language are wanted."""
        same = [s for s in self.samples if s["direction"] == batch.direction and s["task"] == batch.task]
        return max(0, self._wanted - len(same))

    def _keep(self, batch: Batch, rows: Sequence[Row]) -> None:
        names = ("task", "direction", "source", "reference", "hypothesis")
        self.samples += [dict(zip(names, (batch.task, batch.direction or "", *row), strict=True)) for row in rows]


def _metrics(kept: nn.ModuleDict) -> Iterable[AnswerScore]:
    return cast(Iterable[AnswerScore], kept.values())


def _logged(kept: nn.ModuleDict) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in _metrics(kept):
        found |= metric.log_values()
        metric.reset()
    return found
