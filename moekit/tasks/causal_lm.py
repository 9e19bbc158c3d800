"""Causal language modelling on a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moekit.data.batch import Batch, Sentences, framed
from moekit.tasks.head import Head, Scores, TokenHead, name_routings, pick
from moekit.tasks.task import SampleWording, Task


class CausalLMHead(TokenHead):
    """Predict each token from those before it, with a decoder-only backbone.

    Args:
        backbone: see `Head`.
        label_smoothing: epsilon of the cross-entropy.
        aux: see `Head`.
        learning_rate: see `Head`.

    Source: arXiv:2112.10684 (sparse), arXiv:2005.14165 (dense).
    """

    task: ClassVar[str] = "causal_lm"

    def score(self, batch: Batch, backbone: Any) -> Scores:  # noqa: D102
        if batch.target is None or batch.target_mask is None:
            raise ValueError(f"a batch of task {batch.task!r} must have a target: got none.")
        decoded = backbone.decode(batch.target[:, :-1], batch.target_mask[:, 1:], language=batch.target_language)
        logits = backbone.logits(pick(decoded.hidden, batch.predicted))
        return Scores(logits, pick(batch.target[:, 1:], batch.predicted), name_routings(backbone, decoded))


@dataclass(frozen=True)
class CausalLMTask(Task):
    """The text, predicted left to right."""

    name: ClassVar[str] = CausalLMHead.task
    title: ClassVar[str] = "Next word"
    explanation: ClassVar[str] = "Guess the next word of a text."
    samples: ClassVar[SampleWording] = SampleWording(
        "Sample continuations",
        "Beginnings of held-out texts the model never saw, and how it went on. Marked words stand in the true "
        "continuation too, in the same order; a text can go on in many ways, so judge whether it reads well.",
        "Prompt",
        "True continuation",
    )
    head: ClassVar[type[CausalLMHead]] = CausalLMHead
    writes = "continuation"

    @classmethod
    def make_head(cls, dim: int, label_smoothing: float) -> Head:  # noqa: D102
        return cls.head(label_smoothing=label_smoothing)

    def collate(self, rows: Sentences) -> Batch:
        """``bos text eos``, which is source and target at once."""
        ids, mask = framed(
            rows.texts[0],
            rows.tokenizer.bos_id,
            rows.tokenizer.eos_id,
            rows.tokenizer.pad_id,
            rows.width(rows.lengths[0]),
        )
        return Batch(
            task=self.name,
            source=ids,
            source_mask=mask,
            target=ids,
            target_mask=mask,
            labels=None,
            source_language=torch.from_numpy(rows.languages[0]),
            target_language=torch.from_numpy(rows.languages[1]),
            direction=rows.direction,
            one_text=True,
        )
