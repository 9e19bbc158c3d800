"""How a token-choice router tries experts other than the best: the four ways that Switch Transformers compares.

Argmax is no exploration (None). All of them act in training only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from moekit.functional.random_bits import jitter
from moekit.functional.sampling import gumbel_topk_scores


class Exploration:
    """Noise of a router in training, on its input or on the scores by which experts are ranked.

    Subclass it for a way of your own; the router calls it in training only.
    """

    def perturb(self, x: Tensor) -> Tensor:
        """The router's input, ``x`` Float32[T, D], with noise; the experts see the clean one."""
        return x

    def rank(self, probs: Tensor) -> Tensor:
        """Float[T, E]: scores whose largest are chosen, from ``probs`` Float[T, E] without gradient.

        The weights stay the probabilities.
        """
        return probs


@dataclass(frozen=True)
class InputJitter(Exploration):
    """Multiply the router's input by U(1 - epsilon, 1 + epsilon).

    Raises:
        ValueError: if `epsilon` is not in [0, 1).

    Source: arXiv:2101.03961 appendix C; epsilon 0.01 in its experiments and in Mesh-TensorFlow.
    Differs: the pseudo-code of the paper adds the noise to the logits; this follows the authors' code.
    """

    epsilon: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"InputJitter.epsilon must be in [0, 1): got {self.epsilon}. The papers use 0.01.")

    def perturb(self, x: Tensor) -> Tensor:  # noqa: D102
        return jitter(x, self.epsilon)


@dataclass(frozen=True)
class InputDropout(Exploration):
    """Dropout on the router's input.

    Raises:
        ValueError: if `probability` is not in [0, 1).

    Source: arXiv:2101.03961 appendix C, which names no rate; 0.1 is ours.
    """

    probability: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise ValueError(f"InputDropout.probability must be in [0, 1): got {self.probability}.")

    def perturb(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.dropout(x, self.probability)


@dataclass(frozen=True)
class SampledSoftmax(Exploration):
    """Draw experts from the router's probabilities instead of taking the best (without replacement where k > 1).

    Source: arXiv:2101.03961 appendix C, where it is clearly worse than argmax.
    """

    def rank(self, probs: Tensor) -> Tensor:  # noqa: D102
        return gumbel_topk_scores(probs)
