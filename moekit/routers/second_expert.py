"""Which choices of a token are made after the first, and which of them are sent: one policy, one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.functional.sampling import gumbel_topk_scores


class SecondExpertPolicy(ABC):
    """How a token's second, third, ... choices are picked, and whether they are sent to their experts.

    Subclass it for a policy of your own: `pick` chooses experts, `send` says which of the later choices go.
    """

    def pick(self, scores: Tensor, probs: Tensor, k: int, *, training: bool) -> Tensor:
        """The k different experts of each token, the first choice first: here those with the k largest scores.

        Args:
            scores: Float[T, E], by which the router ranks experts: `probs`, or with exploration something noisy.
            probs: Float[T, E], without gradient.
            k: choices per token.
            training: whether noise is welcome.

        Returns:
            Int64[T, k].
        """
        return scores.topk(k, dim=-1).indices

    @abstractmethod
    def send(self, weight: Tensor, *, training: bool) -> Tensor:
        """Bool of the shape of ``weight`` Float[T, k - 1], the weights of the later choices: which are sent."""

    def sends_all(self, *, training: bool) -> bool:
        """Whether `send` is known to send every choice, so that nobody has to look: here it is not known."""
        return False


@dataclass(frozen=True)
class AllChoices(SecondExpertPolicy):
    """Every choice is sent.

    Source: the policy "all" of fairseq and Mesh-TensorFlow (arXiv:2112.10684 trains with it).
    """

    def send(self, weight: Tensor, *, training: bool) -> Tensor:  # noqa: D102
        return torch.ones_like(weight, dtype=torch.bool)

    def sends_all(self, *, training: bool) -> bool:  # noqa: D102
        return True


@dataclass(frozen=True)
class _AboveThreshold(SecondExpertPolicy):
    threshold: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"{type(self).__name__}.threshold must be in (0, 1]: got {self.threshold}.")


class RandomChoice(_AboveThreshold):
    """Send a later choice with probability ``min(1, weight / threshold)``.

    Threshold 0.5 is GShard's rule "2 g2 > U(0, 1)" (arXiv:2006.16668 Algorithm 1); 0.2 is ST-MoE's
    (arXiv:2202.08906 appendix C). In training only: in evaluation every choice is sent.

    Attributes:
        threshold: weight from which a choice is always sent.

    Raises:
        ValueError: if `threshold` is not in (0, 1].

    Source: arXiv:2006.16668 Algorithm 1; arXiv:2202.08906 appendix C.
    Differs: a choice that is not sent takes no place in its expert's queue. Algorithm 1 raises the expert's counter
    for every second choice, sent or not, and so leaves slots empty.
    """

    def send(self, weight: Tensor, *, training: bool) -> Tensor:  # noqa: D102
        if not training:
            return torch.ones_like(weight, dtype=torch.bool)
        return weight.detach() > torch.rand_like(weight) * self.threshold

    def sends_all(self, *, training: bool) -> bool:  # noqa: D102
        return not training


class ThresholdChoice(_AboveThreshold):
    """Send a later choice where its weight is above a threshold: deterministic, the same in evaluation.

    Attributes:
        threshold: weight that a choice must exceed.

    Raises:
        ValueError: if `threshold` is not in (0, 1].

    Source: the policy "threshold" of Mesh-TensorFlow's top-2 gate (the code of arXiv:2006.16668 and 2202.08906).
    """

    def send(self, weight: Tensor, *, training: bool) -> Tensor:  # noqa: D102
        return weight.detach() > self.threshold


@dataclass(frozen=True)
class SampledChoice(AllChoices):
    """Draw the later choices from the router's probabilities instead of taking the next best; all are sent.

    The first choice stays the best expert. The second is the argmax of logits plus Gumbel noise without the first, and
    so on: draws without replacement. Weights are the clean probabilities of what was drawn. In training only: in
    evaluation the k best are taken.

    Source: the policy "sampling" of fairseq's and DeepSpeed's top-2 gates (arXiv:2112.10684, arXiv:2201.05596).
    Differs: those sample in evaluation too, and DeepSpeed's noise also changes the logits that the caller holds.
    """

    def pick(self, scores: Tensor, probs: Tensor, k: int, *, training: bool) -> Tensor:  # noqa: D102
        if not training or k == 1:
            return super().pick(scores, probs, k, training=training)
        first = scores.argmax(-1, keepdim=True)
        later = gumbel_topk_scores(probs).scatter(1, first, -1.0).topk(k - 1, dim=-1).indices
        return torch.cat([first, later], dim=1)
