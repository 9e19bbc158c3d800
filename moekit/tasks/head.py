"""What a head is: the weights and the loss of one task, over a backbone that it may share with others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from moekit.component import Component
from moekit.data.batch import Batch
from moekit.kernels.vocabulary_loss import TokenLoss, logits_loss
from moekit.layer import AuxLosses
from moekit.routing import Routing, register_pytree
from moekit.tasks.score import AnswerScore
from moekit.transformer.output import DecoderOutput


class Backbone(Protocol):
    """What heads ask of a model; `moekit.transformer.EncoderDecoder` and `DecoderOnly` answer.

    One that also has their `cross_entropy` is asked for that where only the loss is wanted.
    """

    def logits(self, hidden: Tensor) -> Tensor:
        """Float[..., V] scores of ``hidden`` Float[..., D] over the vocabulary."""


@dataclass(frozen=True)
class Prediction:
    """Loss and counts of some predictions.

    Attributes:
        loss: float32 scalar to minimise, a mean over predicted tokens.
        nll: float32 scalar, detached: summed negative log-likelihood in nats (no smoothing), for perplexity.
        correct: Int64 scalar, predictions that were right.
        num_predictions: Int64 scalar, predictions made: the denominator of loss, accuracy and perplexity.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor
    num_predictions: Tensor


@dataclass(frozen=True)
class HeadOutput(Prediction):
    """What a head returns for a batch: its predictions, and what else is to be known of them.

    Attributes:
        routings: routings of the sparse layers that ran, by layer name (``encoder.1``).
        extra: further detached scalars to log, by name.
        labels: Int64[N], what is right in each prediction, one of the numbers below that of possible answers; None =
            nobody counts them.
    """

    routings: Mapping[str, Routing]
    extra: Mapping[str, Tensor]
    labels: Tensor | None = None

    def to_log(self) -> dict[str, Tensor]:
        """Scalars for a log: the mean ``loss`` in nats, as validation measures it, the ``accuracy``, and `extra`."""
        predictions = self.num_predictions.clamp_min(1)
        return {"loss": self.nll / predictions, "accuracy": self.correct / predictions, **self.extra}


register_pytree(HeadOutput)


def required(value: Tensor | None, what: str, batch: Batch) -> Tensor:
    """A tensor of `batch` without which its task can do nothing.

    Raises:
        ValueError: if it is None.
    """
    if value is None:
        raise ValueError(f"a batch of task {batch.task!r} must have {what}: got none.")
    return value


def pick(values: Tensor, places: Tensor | None) -> Tensor:
    """The entries of ``values`` [B, S, ...] at `places` Int64[N] of their flattened first two dimensions: [N, ...].

    The places of a `Batch` are known with it. Indexing by a mask would make a GPU's host wait for their number.
    """
    assert places is not None, "collated batches have them"
    return values.flatten(0, 1).index_select(0, places)


def predict(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Prediction:
    """Cross-entropy with label smoothing, and what a log wants to know beside it.

    Args:
        logits: Float[N, V].
        labels: Int64[N].
        label_smoothing: epsilon; the target is (1 - epsilon) on the label and epsilon / V everywhere.

    Returns:
        Means and sums over the N predictions; the loss of no prediction is 0 (with a gradient path, so that every
        process of a distributed run takes part in the same collectives).

    Source: arXiv:1512.00567 section 7.
    """
    return _prediction(logits_loss(logits, labels, label_smoothing), labels)


def _prediction(found: TokenLoss, labels: Tensor) -> Prediction:
    return Prediction(*found, num_predictions=torch.full_like(found.correct, labels.numel()))


@dataclass(frozen=True)
class States:
    """What a model knows where a batch asks for tokens, before it is compared with the vocabulary.

    Attributes:
        hidden: Float[N, D], of the N predictions.
        labels: Int64[N], what is right; padding is not among them.
        routings: routings of the sparse layers that ran, by layer name.
    """

    hidden: Tensor
    labels: Tensor
    routings: Mapping[str, Routing]


@dataclass(frozen=True)
class Scores:
    """What a model says of the tokens that a batch asks for.

    Attributes:
        logits: Float[N, V], of the N predictions.
        labels: Int64[N], what is right; padding is not among them.
        routings: routings of the sparse layers that ran, by layer name.
    """

    logits: Tensor
    labels: Tensor
    routings: Mapping[str, Routing]


class Head(Component, ABC):
    """One training task over a backbone.

    Beside others, a `moekit.training.MultitaskModule` calls ``head(batch, backbone)``. Alone, build it with its
    backbone and give it to a Trainer: it is a LightningModule with a training and a validation step and AdamW.

    Args:
        backbone: the model to train alone with; None where the head is one of several.
        aux: weighs the routers' losses when the head trains alone.
        learning_rate: the rate of AdamW when the head trains alone.

    Attributes:
        task: name of its task.
        scores: scores of the answers that the model writes in the test, labels by name; empty = the test measures the
            loss.
        choices: number of possible answers to a prediction; None = the vocabulary's.
        make_score: metric of these answers, made for some directions such as ``"en-de"``, where there are `scores`.
    """

    task: ClassVar[str]
    scores: ClassVar[Mapping[str, str]] = {}
    choices: ClassVar[int | None] = None
    make_score: ClassVar[type[AnswerScore]]

    def __init__(
        self, backbone: nn.Module | None = None, *, aux: AuxLosses | None = None, learning_rate: float = 1e-3
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.aux = aux
        self.learning_rate = learning_rate

    @abstractmethod
    def compute(self, batch: Batch, backbone: Any) -> HeadOutput:
        """Loss and counts of `batch` over `backbone`."""

    def forward(self, batch: Batch, backbone: Any = None) -> HeadOutput:
        """Loss and counts of `batch`, over the given backbone or the head's own.

        Raises:
            ValueError: if there is neither.
        """
        model = backbone if backbone is not None else self.backbone
        if model is None:
            raise ValueError(
                f"{type(self).__name__} needs a backbone: it was built without one and none was given. Build it as "
                f"{type(self).__name__}(backbone) or call it as head(batch, backbone)."
            )
        return self.compute(batch, model)

    def _step(self, batch: Batch | Mapping[str, Batch], stage: str) -> Tensor:
        """One step alone: this head's batch out of a mixed one, its loss and the routers'."""
        own = batch if isinstance(batch, Batch) else batch[self.task]
        out = self(own)
        total, logs = out.loss, {f"{stage}/{self.task}/{name}": value for name, value in out.to_log().items()}
        if self.aux is not None and out.routings:
            extra, terms = self.aux(*out.routings.values())
            total = total + extra
            logs |= {f"{stage}/aux/{name}": value for name, value in terms.items()}
        self.log_dict(logs, batch_size=own.source.shape[0])
        return total

    def training_step(self, batch: Batch | Mapping[str, Batch], batch_idx: int) -> Tensor:  # noqa: D102
        return self._step(batch, "train")

    def validation_step(self, batch: Batch | Mapping[str, Batch], batch_idx: int) -> None:  # noqa: D102
        self._step(batch, "valid")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over everything, for training alone."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class TokenHead(Head):
    """A head that predicts tokens of the vocabulary: a subclass says which (`states`), the loss is cross-entropy.

    Args: as of `Head`, and `label_smoothing`, the epsilon of the cross-entropy.

    Raises:
        ValueError: if `label_smoothing` is not in [0, 1).
    """

    def __init__(self, backbone: nn.Module | None = None, *, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(backbone, **options)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1): got {label_smoothing}.")
        self.label_smoothing = label_smoothing

    @abstractmethod
    def states(self, batch: Batch, backbone: Any) -> States:
        """States and labels of everything that is predicted in `batch`, in an order that is the same for every model.

        Raises:
            ValueError: if the batch lacks what the task needs.
        """

    def score(self, batch: Batch, backbone: Any) -> Scores:
        """Logits and labels of everything that is predicted in `batch`, in the order of `states`."""
        found = self.states(batch, backbone)
        return Scores(backbone.logits(found.hidden), found.labels, found.routings)

    def compute(self, batch: Batch, backbone: Any) -> HeadOutput:
        """Loss and counts: from the backbone's `cross_entropy`, or from its `logits` where it has none."""
        if not hasattr(backbone, "cross_entropy"):
            return self.judge(self.score(batch, backbone))
        found = self.states(batch, backbone)
        loss = backbone.cross_entropy(found.hidden, found.labels, self.label_smoothing)
        return self._output(_prediction(loss, found.labels), found)

    def judge(self, scores: Scores) -> HeadOutput:
        """Loss and counts of scores."""
        return self._output(predict(scores.logits, scores.labels, self.label_smoothing), scores)

    def _output(self, made: Prediction, of: States | Scores) -> HeadOutput:
        return HeadOutput(**vars(made), routings=of.routings, extra={}, labels=of.labels)


def name_routings(backbone: Any, *outputs: Any) -> dict[str, Routing]:
    """Routings by layer name (``encoder.1`` is the sparse layer in the encoder's block 1).

    Args:
        backbone: names its sparse layers in `routed_layers`, an encoder's before a decoder's.
        *outputs: what its `encode` and `decode` returned; a part that did not run is left out.
    """
    named: dict[str, Routing] = {}
    for output in outputs:
        side = "decoder" if isinstance(output, DecoderOutput) else "encoder"
        names = [name for name in backbone.routed_layers if name.startswith(side)]
        named.update(zip(names, output.routings, strict=True))
    return named
