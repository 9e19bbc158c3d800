"""What tasks share that go from one sequence to another: they differ in data, not in arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from moekit.data.batch import Batch, Sentences, pair_batch
from moekit.tasks.head import States, TokenHead, name_routings, pick, required
from moekit.tasks.task import Lengths, Task


class SequenceHead(TokenHead):
    """Encode the source, decode the target with teacher forcing, predict every real target token.

    Args: as of `TokenHead`, with a `label_smoothing` of 0.1 as in arXiv:1706.03762 section 5.4.
    """

    def __init__(self, backbone: nn.Module | None = None, *, label_smoothing: float = 0.1, **options: Any) -> None:
        super().__init__(backbone, label_smoothing=label_smoothing, **options)

    def states(self, batch: Batch, backbone: Any) -> States:  # noqa: D102
        target, mask = (required(part, "a target", batch) for part in (batch.target, batch.target_mask))
        encoded = backbone.encode(batch.source, batch.source_mask, language=batch.source_language)
        decoded = backbone.decode(
            target[:, :-1],
            encoded.hidden,
            batch.source_mask,
            target_mask=mask[:, 1:],
            language=batch.target_language,
        )
        # Only real tokens go through the output projection, the largest product of a small model.
        hidden, labels = (pick(part, batch.predicted) for part in (decoded.hidden, target[:, 1:]))
        return States(hidden, labels, name_routings(backbone, encoded, decoded))


@dataclass(frozen=True)
class PairTask(Task):
    """A task on pairs of texts, source -> target, whose answers the test scores.

    Attributes:
        about: what the pairs are, for the help of recipes.
        sentinel: the first sentinel ends the source and begins the target, as in span corruption, so that fine-tuning
            looks like such a pre-training (arXiv:2202.08906 section 4).
    """

    pairs: ClassVar[bool] = True
    about: ClassVar[str]

    sentinel: bool = False

    @classmethod
    def configured(cls, data: Any) -> dict[str, Any]:  # noqa: D102
        return {"sentinel": data.sentinel}

    def sizes(self, lengths: Lengths) -> Sequence[Lengths]:  # noqa: D102
        return list(lengths + self.sentinel)

    def collate(self, rows: Sentences) -> Batch:
        """``<2xx> source eos`` and ``bos target eos``; with a sentinel ``<2xx> source s eos`` and ``bos s target eos``.

        Source: arXiv:1611.04558 (target-language tag at the source's head); sentinels arXiv:2202.08906 section 4.
        """
        source, target = rows.texts
        if self.sentinel:
            mark = rows.tokenizer.sentinel_ids[0]
            source, target = source.append(mark), target.prepend(mark)
        width = rows.width(rows.lengths[0] + self.sentinel), rows.width(rows.lengths[1] + self.sentinel)
        return pair_batch(self.name, rows, source, target, width, cut=rows.goes_on(1))
