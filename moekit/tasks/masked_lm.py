"""Masked language modelling on the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from moekit.data.batch import Batch, Sentences, labelled_batch
from moekit.data.keyed import Keys
from moekit.data.noising import check_ratio, check_shares, mask_tokens
from moekit.data.ragged import Ragged
from moekit.data.tokenizer import Tokenizer
from moekit.tasks.head import Head, States, TokenHead, name_routings, pick, required
from moekit.tasks.task import Task


@dataclass(frozen=True)
class Masking:
    """How a sentence is masked for masked LM and replaced-token detection.

    Attributes:
        ratio: share of tokens to predict.
        replace: shares of them that become the mask, a random id, stay.

    Source: arXiv:1810.04805 section 3.1. Differs: `ratio * length` is rounded up or down at random, so that its mean is
        exact; BERT's code takes the nearest number.
    """

    ratio: float = 0.15
    replace: tuple[float, float, float] = (0.8, 0.1, 0.1)

    def __post_init__(self) -> None:
        check_ratio("ratio", self.ratio)
        check_shares(self.replace)

    def apply(self, text: Ragged, keys: Keys, tokenizer: Tokenizer) -> tuple[Ragged, Ragged]:
        """Masked copies of `text`, and labels."""
        return mask_tokens(
            text,
            keys,
            ratio=self.ratio,
            mask_id=tokenizer.mask_id,
            random_ids=(tokenizer.first_text_id, tokenizer.vocab_size),
            replace=self.replace,
            protected=text.tokens < tokenizer.first_text_id,
        )


class MaskedLMTransform(nn.Module):
    """The small network between encoder and output projection: linear, GELU, norm.

    Args:
        dim: D.

    Source: arXiv:1810.04805, authors' code (GELU by tanh, norm with epsilon 1e-12); arXiv:2003.10555's generator has
        the same. Differs: the scores over the vocabulary, which are the backbone's, get no bias.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, hidden: Tensor) -> Tensor:
        """Float[..., D] to Float[..., D]."""
        out: Tensor = self.norm(F.gelu(self.dense(hidden), approximate="tanh"))
        return out


class MaskedLMHead(TokenHead):
    """Predict the original of masked tokens from the encoder alone; the decoder idles.

    Args: as of `TokenHead`, after `dim`, the D of the backbone.

    Source: arXiv:1810.04805 section 3.1; as one of the tasks of arXiv:2109.10465.
    """

    task: ClassVar[str] = "masked_lm"

    def __init__(self, dim: int, backbone: nn.Module | None = None, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.transform = MaskedLMTransform(dim)

    def states(self, batch: Batch, backbone: Any) -> States:  # noqa: D102
        labels = required(batch.labels, "labels", batch)
        encoded = backbone.encode(batch.source, batch.source_mask, language=batch.source_language)
        hidden, labels = (pick(part, batch.predicted) for part in (encoded.hidden, labels))
        return States(self.transform(hidden), labels, name_routings(backbone, encoded))


def masked_batch(task: str, masking: Masking, rows: Sentences) -> Batch:
    """``<2xx> masked eos`` with the original ids as labels at masked places."""
    masked, labels = masking.apply(rows.texts[0], rows.keys, rows.tokenizer)
    return labelled_batch(task, rows, masked, labels, rows.width(rows.lengths[0]))


@dataclass(frozen=True)
class MaskedLMTask(Task):
    """Masked sentence on the encoder; labels at the masked places.

    Attributes:
        masking: how sentences are masked; None = as BERT does.
    """

    name: ClassVar[str] = MaskedLMHead.task
    title: ClassVar[str] = "Masked words"
    explanation: ClassVar[str] = "Guess the words hidden in a sentence, in the encoder alone."
    head: ClassVar[type[MaskedLMHead]] = MaskedLMHead
    recalls = "masked"

    masking: Masking | None = None

    @classmethod
    def configured(cls, data: Any) -> dict[str, Any]:  # noqa: D102
        return {"masking": Masking(replace=data.mask_shares)}

    @classmethod
    def make_head(cls, dim: int, label_smoothing: float) -> Head:  # noqa: D102
        return cls.head(dim)

    def collate(self, rows: Sentences) -> Batch:  # noqa: D102
        return masked_batch(self.name, self.masking or Masking(), rows)
