"""Replaced-token detection (ELECTRA): the encoder tells which tokens a small generator has replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.data.batch import Batch, Sentences
from moekit.errors import UserError
from moekit.tasks.head import Head, HeadOutput, name_routings, pick, predict, required
from moekit.tasks.masked_lm import MaskedLMTransform, Masking, masked_batch
from moekit.tasks.task import Task

ELECTRA = Masking(replace=(1.0, 0.0, 0.0))
"""Of the generator of replaced-token detection: the mask alone.

Source: arXiv:2003.10555 section 2. Differs: the authors' code leaves 15 % of the chosen tokens as they are.
"""


class ReplacedTokenHead(Head):
    """ELECTRA on the encoder.

    A small generator fills the masked places by sampling from its own masked language model, whose head is BERT's
    (linear, GELU, norm, then its embedding's scores); the encoder sees the filled text and tells for every real token
    whether it is the original, by linear, GELU and one score. Loss = generator's masked LM loss +
    `discriminator_weight` * binary cross-entropy. A sample that happens to equal the original counts as original.

    Args:
        generator: a small masked language model with `encode`, `logits` and `dim`, such as `EncoderOnly`.
        dim: D of the backbone.
        backbone: the model to train alone with, or None.
        discriminator_weight: 50 in arXiv:2003.10555 section 3.1.
        options: those of `Head`.

    `HeadOutput.nll` and `correct` are the discriminator's, over real tokens; the generator's loss, the share of
    replaced tokens and the detection rate among them are in `extra`.

    Raises:
        UserError: in loading, if the weights are of a version whose generator had no such head.

    Source: arXiv:2003.10555 section 2; both heads as in the authors' code. Differs: the generator has an embedding of
        its own instead of a projection of the discriminator's, so that the head can be added to any backbone; its
        scores have no bias.
    """

    task: ClassVar[str] = "replaced_token"
    choices: ClassVar[int | None] = 2  # the original, or not

    def __init__(
        self,
        generator: nn.Module,
        dim: int,
        backbone: nn.Module | None = None,
        *,
        discriminator_weight: float = 50.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        self.generator = generator
        self.generator_transform = MaskedLMTransform(int(cast(Any, generator).dim))
        self.transform = nn.Linear(dim, dim)
        self.detect = nn.Linear(dim, 1)
        self.discriminator_weight = discriminator_weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        new = f"{prefix}generator_transform."
        if f"{prefix}detect.weight" in state_dict and not any(name.startswith(new) for name in state_dict):
            raise UserError(
                "these weights are of a version of moekit whose generator of replaced tokens scored the vocabulary "
                f"without a layer and a norm before it: {new}dense.weight is missing, and nothing that was trained can "
                "take its place. Train again, use the version that they are of, or begin that layer anew: add "
                f'generator_transform.state_dict(prefix="{new}") of a fresh head to the weights.'
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fill(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The text with sampled tokens in the masked places Int64[B, S], and the generator's loss."""
        labels = required(batch.labels, "labels", batch)
        generator: Any = self.generator
        hidden = generator.encode(batch.source, batch.source_mask, language=batch.source_language).hidden
        logits = generator.logits(self.generator_transform(pick(hidden, batch.predicted)))
        loss = predict(logits, pick(labels, batch.predicted)).loss
        with torch.no_grad():
            # In evaluation the same batch gets the same samples every time.
            draw = None if self.training else torch.Generator(logits.device).manual_seed(0)
            probs = logits.float().softmax(-1)
            # The draws of torch.multinomial, which has the host look at the probabilities first.
            sampled = (probs / torch.empty_like(probs).exponential_(generator=draw)).argmax(-1)
        assert batch.predicted is not None
        return batch.source.flatten().index_copy(0, batch.predicted, sampled).view_as(batch.source), loss

    def compute(self, batch: Batch, backbone: Any) -> HeadOutput:  # noqa: D102
        labels = required(batch.labels, "labels", batch)
        filled, generator_loss = self.fill(batch)
        original = torch.where(labels >= 0, labels, batch.source)
        real = batch.source_mask
        replaced = pick(filled != original, batch.real)
        encoded = backbone.encode(filled, real, language=batch.source_language)
        hidden = F.gelu(self.transform(pick(encoded.hidden, batch.real)), approximate="tanh")
        logits = self.detect(hidden).squeeze(-1).float()
        n = torch.full((), replaced.numel(), dtype=torch.int64, device=logits.device)
        summed = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="sum")
        guess = logits > 0
        extra = {
            "generator_loss": generator_loss.detach(),
            "discriminator_loss": (summed / n.clamp_min(1)).detach(),
            "replaced": replaced.sum() / n.clamp_min(1),
            "detected": (guess & replaced).sum() / replaced.sum().clamp_min(1),
        }
        return HeadOutput(
            loss=generator_loss + self.discriminator_weight * summed / n.clamp_min(1),
            nll=summed.detach(),
            correct=(guess == replaced).sum(),
            num_predictions=n,
            routings=name_routings(backbone, encoded),
            extra=extra,
            labels=replaced.long(),
        )


@dataclass(frozen=True)
class ReplacedTokenTask(Task):
    """Masked sentence for the generator, which fills it; the discriminator says which tokens were replaced.

    Attributes:
        masking: how sentences are masked; None = as ELECTRA's generator sees them, the mask alone.
    """

    name: ClassVar[str] = ReplacedTokenHead.task
    title: ClassVar[str] = "Replaced-token detection"
    explanation: ClassVar[str] = "Tell which words of a sentence a small generator has replaced."
    head: ClassVar[type[ReplacedTokenHead]] = ReplacedTokenHead
    perplexity = False  # it answers yes or no

    masking: Masking | None = None

    @classmethod
    def make_head(cls, dim: int, label_smoothing: float) -> Head:
        """Raise UserError: the model of a recipe that does not make this head itself has no generator."""
        raise UserError(f"the task {cls.name} needs a generator, which this model has not. Leave the task out.")

    def collate(self, rows: Sentences) -> Batch:  # noqa: D102
        return masked_batch(self.name, self.masking or ELECTRA, rows)
