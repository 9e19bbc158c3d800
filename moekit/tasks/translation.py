"""Machine translation, on parallel text: its data, its head, and BLEU and chrF by direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moekit.tasks.bleu import bleu, tokenizer_of
from moekit.tasks.score import AnswerScore
from moekit.tasks.sequence import PairTask, SequenceHead
from moekit.tasks.task import SampleWording

_BLEU_COUNTS = 10  # two lengths, four n-gram matches, four n-gram totals
_CHRF_COUNTS = 18  # for each of six orders: n-grams of the hypothesis, of the reference, and common to both


class TranslationScore(AnswerScore):
    """Corpus BLEU and chrF for each translation direction, with sacrebleu's signatures.

    The state is the sufficient statistics (n-gram counts), summed over batches and processes: the scores equal
    `corpus_score` of all strings together. Where the directions have different tokenizers, the signature of BLEU is
    those of all, the second and later ones with the target languages that they are of.

    Args: as of `AnswerScore`; `tokenize` names sacrebleu's tokenizer for BLEU, and ``"auto"`` is that of the target
    language (`moekit.tasks.bleu.tokenizer_of`), ``"13a"`` for most.

    Source: BLEU arXiv:1804.08771 (sacrebleu), chrF W15-3049; the counting is sacrebleu's own code.

    Example:
        >>> score = TranslationScore(["en-de"])
        >>> score.update("en-de", ["das ist ein kleiner Test"], ["das ist ein kleiner Test"])
        >>> round(score.compute()["bleu"]["average"], 1)
        100.0
    """

    bleu_counts: Tensor
    chrf_counts: Tensor

    def __init__(self, directions: Sequence[str], **kwargs: Any) -> None:
        from sacrebleu.metrics.chrf import CHRF  # where it is used: a help text scores nothing

        super().__init__(directions, **kwargs)
        targets = [name.rpartition("-")[2] for name in self.directions]
        self._tokenizers = [tokenizer_of(target) if self.tokenize == "auto" else self.tokenize for target in targets]
        self._chrf = CHRF()
        self._chrf.num_refs = 1  # for the signature
        zeros = torch.zeros(len(self.directions), _BLEU_COUNTS, dtype=torch.int64)
        self.add_state("bleu_counts", zeros, dist_reduce_fx="sum")
        self.add_state("chrf_counts", zeros.new_zeros(len(self.directions), _CHRF_COUNTS), dist_reduce_fx="sum")

    def count(self, row: int, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add the n-gram counts of one batch to row `row`.

        Raises:
            UserError: the tokenizer is not installed.
        """
        metrics = bleu(self._tokenizers[row]), self._chrf
        for counts, metric in zip((self.bleu_counts, self.chrf_counts), metrics, strict=True):
            statistics = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
            found = torch.tensor(statistics, dtype=torch.int64).sum(0)
            counts[row] += found.to(counts.device)  # host read: none, but a copy that waits

    def compute(self) -> dict[str, dict[str, Any]]:
        """The scores ``"bleu"`` and ``"chrf"`` in the form of summary.json (see `summary`)."""
        rows = zip(self._tokenizers, self.bleu_counts.tolist(), strict=True)  # host read: once for an evaluation
        bleus = [_score(bleu(tokenizer), row) for tokenizer, row in rows]
        chrfs = [_score(self._chrf, row) for row in self.chrf_counts.tolist()]  # host read: once for an evaluation
        return {
            "bleu": self.summary(bleus, self._signature()),
            "chrf": self.summary(chrfs, str(self._chrf.get_signature())),
        }

    def _signature(self) -> str:
        """That of most directions, then each of the others with its languages."""
        seen = self.sentences.tolist()  # host read: once for an evaluation
        languages: dict[str, dict[str, None]] = {}
        for name, tokenizer, number in zip(self.directions, self._tokenizers, seen, strict=True):
            if number or not any(seen):
                languages.setdefault(tokenizer, {})[name.rpartition("-")[2]] = None
        first, *others = sorted(languages, key=lambda tokenizer: (tokenizer != "13a", tokenizer))
        said = [f"{bleu(other).get_signature()} (into {', '.join(languages[other])})" for other in others]
        return "; ".join([str(bleu(first).get_signature()), *said])


def _score(metric: Any, counts: Sequence[int]) -> float:
    return float(metric._compute_score_from_stats(counts).score)


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
    recalls = "target"
    head = TranslationHead
    about = "translation: learn from parallel text."
