"""Causal language modelling on a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moekit.data.batch import Batch, Sentences
from moekit.tasks.head import States, TokenHead, name_routings, pick, required
from moekit.tasks.task import SampleWording, Task


class CausalLMHead(TokenHead):
    """Predict each token from those before it, with a decoder-only backbone.

    Source: arXiv:2112.10684 (sparse), arXiv:2005.14165 (dense).
    """

    task: ClassVar[str] = "causal_lm"

    def states(self, batch: Batch, backbone: Any) -> States:  # noqa: D102
        target, mask = (required(part, "a target", batch) for part in (batch.target, batch.target_mask))
        decoded = backbone.decode(target[:, :-1], mask[:, 1:], language=batch.target_language)
        hidden, labels = (pick(part, batch.predicted) for part in (decoded.hidden, target[:, 1:]))
        return States(hidden, labels, name_routings(backbone, decoded))


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
    recalls = "sentence"

    def collate(self, rows: Sentences) -> Batch:
        """``bos text eos``, which is source and target at once; of a text that is cut without eos."""
        width = rows.width(rows.lengths[0])
        text = rows.framed(rows.texts[0], rows.tokenizer.bos_id, width, cut=rows.goes_on(0))
        return rows.batch(self.name, text, text, one_text=True)
