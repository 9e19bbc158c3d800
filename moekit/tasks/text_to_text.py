"""Text to text: an input and a target, as T5 casts classification, question answering and summarisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.functional.text import squad
from torchmetrics.functional.text.rouge import rouge_score

from moekit.tasks.score import AnswerScore
from moekit.tasks.sequence import PairTask, SequenceHead
from moekit.tasks.task import SampleWording

_SQUAD, _ROUGE = ("exact_match", "f1"), ("rouge1", "rouge2", "rougeL")


class TextToTextScore(AnswerScore):
    """Exact match, token F1, ROUGE-1, ROUGE-2 and ROUGE-L of answers in percent, each a mean over the examples.

    Exact match and F1 compare words as SQuAD does: in lower case, without punctuation and English articles. ROUGE is
    the F-measure over runs of Latin letters and digits in lower case, without stemming: text in other scripts has none.

    Args: as of `AnswerScore`.

    Source: arXiv:1606.05250 section 6.1 and its evaluation script (exact match, F1); W04-1013 (ROUGE); the counting is
        torchmetrics'.

    Example:
        >>> score = TextToTextScore(["en-en"])
        >>> score.update("en-en", ["The cat.", "a dog"], ["cat", "no dog"])
        >>> {name: round(found["average"], 1) for name, found in score.compute().items()}
        {'exact_match': 50.0, 'f1': 83.3, 'rouge1': 58.3, 'rouge2': 0.0, 'rougeL': 58.3}
    """

    sums: Tensor

    def __init__(self, directions: Sequence[str], **kwargs: Any) -> None:
        super().__init__(directions, **kwargs)
        zeros = torch.zeros(len(self.directions), len(_SQUAD) + len(_ROUGE), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def count(self, row: int, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add the scores of one batch to row `row`."""
        said = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(hypotheses)]
        right: list[Any] = [
            {"answers": {"answer_start": [0], "text": [text]}, "id": str(i)} for i, text in enumerate(references)
        ]
        words, runs = squad(said, right), rouge_score(list(hypotheses), list(references), rouge_keys=_ROUGE)
        means = [float(words[name]) for name in _SQUAD] + [100 * float(runs[f"{name}_fmeasure"]) for name in _ROUGE]
        self.sums[row] += torch.tensor(means, dtype=torch.float64, device=self.sums.device) * len(hypotheses)

    def compute(self) -> dict[str, dict[str, Any]]:
        """The scores by name in the form of summary.json (see `summary`)."""
        means = (self.sums / self.sentences.clamp_min(1)[:, None]).T.tolist()
        signatures = ["case:lc|words:squad1.1"] * len(_SQUAD) + ["case:lc|stemmer:no|measure:f"] * len(_ROUGE)
        return {
            name: self.summary(scores, signature)
            for name, scores, signature in zip((*_SQUAD, *_ROUGE), means, signatures, strict=True)
        }


class TextToTextHead(SequenceHead):
    """Input to target, on pairs of texts.

    Source: arXiv:1910.10683 section 2.4; fine-tuned so by arXiv:2101.03961 section 3 and arXiv:2202.08906 section 4.
    """

    task: ClassVar[str] = "text_to_text"
    scores: ClassVar[Mapping[str, str]] = {
        "exact_match": "Exact match",
        "f1": "F1",
        "rouge1": "ROUGE-1",
        "rouge2": "ROUGE-2",
        "rougeL": "ROUGE-L",
    }
    make_score = TextToTextScore


@dataclass(frozen=True)
class TextToTextTask(PairTask):
    """Input -> target."""

    name: ClassVar[str] = TextToTextHead.task
    title: ClassVar[str] = "Text to text"
    explanation: ClassVar[str] = "Write the answer to an input, such as a class, a short answer or a summary."
    samples: ClassVar[SampleWording] = SampleWording(
        "Sample answers",
        "Held-out inputs the model never saw. Marked words stand in the target too, in the same order.",
        "Input",
        "Target",
        "example",
    )
    head = TextToTextHead
    about = "text to text: learn to write the target of an input, with the source examples."
