"""BLEU and chrF by direction, as sacrebleu computes them, over any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor
from torchmetrics import Metric

_BLEU_COUNTS = 10  # two lengths, four n-gram matches, four n-gram totals
_CHRF_COUNTS = 18  # for each of six orders: n-grams of the hypothesis, of the reference, and common to both


class TranslationScore(Metric):
    """Corpus BLEU and chrF for each translation direction, with sacrebleu's signature.

    The state is the sufficient statistics (n-gram counts), summed over batches and processes: the scores equal
    `corpus_score` of all strings together, and no strings are gathered. Strings must be plain text: detokenized,
    without special tokens.

    Args:
        directions: names such as ``"en-de"``; `update` refuses others.
        tokenize: sacrebleu's tokenizer for BLEU, ``"13a"`` unless the language needs another (``"zh"``,
            ``"char"``, ``"flores200"``, ...).

    Raises:
        ValueError: no directions, or one twice.

    Source: BLEU arXiv:1804.08771 (sacrebleu), chrF W15-3049; the counting is sacrebleu's own code.

    Example:
        >>> score = TranslationScore(["en-de"])
        >>> score.update("en-de", ["das ist ein kleiner Test"], ["das ist ein kleiner Test"])
        >>> round(score.compute()["bleu"]["average"], 1)
        100.0
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    bleu_counts: Tensor
    chrf_counts: Tensor
    sentences: Tensor

    def __init__(self, directions: Sequence[str], *, tokenize: str = "13a", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        names = tuple(str(d) for d in directions)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"TranslationScore needs one or more different directions: got {list(names)}.")
        self.directions = names
        self._bleu = BLEU(tokenize=tokenize, force=True)
        self._chrf = CHRF()
        # The signature reports one reference; sacrebleu learns it from the first corpus it sees.
        self._bleu.num_refs = self._chrf.num_refs = 1
        zeros = torch.zeros(len(names), _BLEU_COUNTS, dtype=torch.int64)
        self.add_state("bleu_counts", zeros, dist_reduce_fx="sum")
        self.add_state("chrf_counts", zeros.new_zeros(len(names), _CHRF_COUNTS), dist_reduce_fx="sum")
        self.add_state("sentences", zeros.new_zeros(len(names)), dist_reduce_fx="sum")

    def update(self, direction: str, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Count one batch of one direction.

        Raises:
            ValueError: an unknown direction, or different numbers of hypotheses and references.
        """
        direction = str(direction)
        if direction not in self.directions:
            raise ValueError(
                f"direction must be one of {list(self.directions)}: got {direction!r}. Name every direction when "
                "making TranslationScore."
            )
        if len(hypotheses) != len(references):
            raise ValueError(
                f"Each hypothesis needs its reference: got {len(hypotheses)} hypotheses and {len(references)} "
                f"references for {direction}."
            )
        if not hypotheses:
            return
        row = self.directions.index(direction)
        for counts, metric in ((self.bleu_counts, self._bleu), (self.chrf_counts, self._chrf)):
            statistics = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
            found = torch.tensor(statistics, dtype=torch.int64).sum(0)
            counts[row] += found.to(counts.device)  # host read: none, but a copy that waits
        self.sentences[row] += len(hypotheses)

    def compute(self) -> dict[str, dict[str, Any]]:
        """The scores in the form of summary.json.

        Returns:
            ``{"bleu": {"average", "signature", "directions": {"en-de": ...}}, "chrf": {the same}}``. Directions
            without a sentence are absent; the average is over the others, None where there is none.
        """
        return {
            "bleu": self._summary(self._bleu, self.bleu_counts),
            "chrf": self._summary(self._chrf, self.chrf_counts),
        }

    def log_values(self) -> dict[str, float]:
        """The scores as a flat dictionary for `log_dict`: ``bleu/en-de``, ..., ``bleu/average``, ``chrf/...``."""
        values: dict[str, float] = {}
        for name, scores in self.compute().items():
            values |= {f"{name}/{direction}": score for direction, score in scores["directions"].items()}
            if scores["average"] is not None:
                values[f"{name}/average"] = scores["average"]
        return values

    def _summary(self, metric: BLEU | CHRF, counts: Tensor) -> dict[str, Any]:
        rows, sentences = counts.tolist(), self.sentences.tolist()  # host read: once for a test
        scores = {
            direction: float(metric._compute_score_from_stats(row).score)
            for direction, row, seen in zip(self.directions, rows, sentences, strict=True)
            if seen
        }
        average = sum(scores.values()) / len(scores) if scores else None
        return {"average": average, "signature": str(metric.get_signature()), "directions": scores}
