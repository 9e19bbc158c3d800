"""Machine translation, on parallel text: its data, its head, and BLEU and chrF by direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor

from moekit.tasks.score import AnswerScore
from moekit.tasks.sequence import PairTask, SequenceHead
from moekit.tasks.task import SampleWording

_BLEU_COUNTS = 10  # two lengths, four n-gram matches, four n-gram totals
_CHRF_COUNTS = 18  # for each of six orders: n-grams of the hypothesis, of the reference, and common to both


class TranslationScore(AnswerScore):
    """Corpus BLEU and chrF for each translation direction, with sacrebleu's signature.

    The state is the sufficient statistics (n-gram counts), summed over batches and processes: the scores equal
    `corpus_score` of all strings together.

    Args: as of `AnswerScore`, and `tokenize`, sacrebleu's tokenizer for BLEU: ``"13a"`` unless the language needs
    another (``"zh"``, ``"char"``, ``"flores200"``, ...).

    Source: BLEU arXiv:1804.08771 (sacrebleu), chrF W15-3049; the counting is sacrebleu's own code.

    Example:
        >>> score = TranslationScore(["en-de"])
        >>> score.update("en-de", ["das ist ein kleiner Test"], ["das ist ein kleiner Test"])
        >>> round(score.compute()["bleu"]["average"], 1)
        100.0
    """

    bleu_counts: Tensor
    chrf_counts: Tensor

    def __init__(self, directions: Sequence[str], *, tokenize: str = "13a", **kwargs: Any) -> None:
        super().__init__(directions, **kwargs)
        self._bleu = BLEU(tokenize=tokenize, force=True)
        self._chrf = CHRF()
        # The signature reports one reference; sacrebleu learns it from the first corpus it sees.
        self._bleu.num_refs = self._chrf.num_refs = 1
        zeros = torch.zeros(len(self.directions), _BLEU_COUNTS, dtype=torch.int64)
        self.add_state("bleu_counts", zeros, dist_reduce_fx="sum")
        self.add_state("chrf_counts", zeros.new_zeros(len(self.directions), _CHRF_COUNTS), dist_reduce_fx="sum")

    def count(self, row: int, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add the n-gram counts of one batch to row `row`."""
        for counts, metric in ((self.bleu_counts, self._bleu), (self.chrf_counts, self._chrf)):
            statistics = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
            found = torch.tensor(statistics, dtype=torch.int64).sum(0)
            counts[row] += found.to(counts.device)  # host read: none, but a copy that waits

    def compute(self) -> dict[str, dict[str, Any]]:
        """The scores ``"bleu"`` and ``"chrf"`` in the form of summary.json (see `summary`)."""
        return {
            name: self.summary(
                [
                    float(metric._compute_score_from_stats(row).score)
                    for row in counts.tolist()  # host read: once for a test
                ],
                str(metric.get_signature()),
            )
            for name, metric, counts in (
                ("bleu", self._bleu, self.bleu_counts),
                ("chrf", self._chrf, self.chrf_counts),
            )
        }


class TranslationHead(SequenceHead):
    """Machine translation: source with a target-language tag to target, on parallel text.

    Source: arXiv:2109.10465; tags as in arXiv:1611.04558.
    """

    task: ClassVar[str] = "translation"
    scores: ClassVar[Mapping[str, str]] = {"bleu": "BLEU", "chrf": "chrF"}
    make_score = TranslationScore


@dataclass(frozen=True)
class TranslationTask(PairTask):
    """Source sentence with the target's tag -> target sentence."""

    name: ClassVar[str] = TranslationHead.task
    title: ClassVar[str] = "Translation"
    explanation: ClassVar[str] = "Write a sentence in another language, word by word."
    samples: ClassVar[SampleWording] = SampleWording(
        "Sample translations",
        "Held-out sentences the model never saw. Marked words stand in the reference too, in the same order; an "
        "unmarked word may still be a good synonym.",
        "Source",
        "Reference",
        "sentence",
        "direction not recorded",
    )
    head = TranslationHead
    about = "translation: learn from parallel text."
