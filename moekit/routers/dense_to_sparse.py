"""Dense-to-sparse gate: all experts run at first; a falling temperature leaves fewer and fewer, at last one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from moekit.functional.losses import load_balance
from moekit.functional.means import masked_mean
from moekit.routers.queueing import clear_padding, routing_of_pairs, score_statistics
from moekit.routers.scorers import ExpertScorer, ScoredRouter
from moekit.routing import Compensation, Routing, RoutingContext


class Schedule(Protocol):
    """A number that is a function of the step alone."""

    def __call__(self, step: Tensor) -> Tensor:
        """Float32 scalar for ``step`` Int64 scalar; tensors, so that no step is read back from the device."""
        ...


@dataclass(frozen=True)
class _Decay(ABC):
    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not (self.start > 0 and self.end > 0):
            raise ValueError(
                f"{name} is a temperature, it needs start and end above 0: got {self.start} and {self.end}."
            )
        if self.steps < 1:
            raise ValueError(f"{name} needs at least 1 step: got {self.steps}.")
        if self.begin < 0:
            raise ValueError(f"{name} must not begin before step 0: got begin={self.begin}.")

    def __call__(self, step: Tensor) -> Tensor:
        """The value at `step`."""
        return self._after(((step - self.begin).to(torch.float32) / self.steps).clamp(0.0, 1.0))

    @abstractmethod
    def _after(self, share: Tensor) -> Tensor:
        """The value when a share of the schedule, Float32 in [0, 1], is done."""


class ExponentialDecay(_Decay):
    """From `start` to `end` in `steps` steps by a constant factor, then constant: start * (end / start)^(step / steps).

    Attributes:
        start: the value at the beginning.
        end: the value at the end.
        steps: number of steps from `start` to `end`.
        begin: step of the beginning, before which the value is `start`: where another phase comes first.

    Raises:
        ValueError: if `start` or `end` is not positive, `steps` is less than 1 or `begin` negative.

    Source: the released code of arXiv:2112.14397 (its default form, from 1.0 to 0.5).
    """

    def _after(self, share: Tensor) -> Tensor:
        return self.start * (self.end / self.start) ** share


class LinearDecay(_Decay):
    """From `start` to `end` in `steps` equal steps, then constant; attributes as of `ExponentialDecay`.

    Source: the released code of arXiv:2112.14397.
    """

    def _after(self, share: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * share


class DenseToSparseRouter(ScoredRouter):
    """Every expert whose Gumbel-softmax probability passes a threshold; the temperature makes them fewer.

    p = softmax((logits + zeta) / tau) with Gumbel noise zeta in training; an expert runs where p > threshold, the most
    probable one always. While tau is high that is nearly every expert; as it falls, how many run depends on the token
    and shrinks; from step `hard_from` only the most probable one is left. No capacity, nothing dropped; assignments
    are a list of (token, expert), so memory grows with the experts that run and never with T * E * T.

    `dim`, `num_experts`, `scorer` and `init_scale` are those of `ScoredRouter`.

    Args:
        temperature: tau by step.
        hard_from: step from which only the argmax runs; None = never.
        threshold: least probability that runs.
        weights: the combine weight: "gumbel" = p, noise and temperature included; "plain" = softmax(logits) at
            temperature 1 without noise. Neither is renormalised over the experts that run.

    The step is a buffer, moved by `on_step_end` and kept in checkpoints. Returns in `Routing.losses`: ``load_balance``
    (of the most probable expert, with the plain probabilities; the paper claims not to need it). In
    `Routing.statistics`: ``active_experts`` (mean per real token), ``temperature``, ``entropy``, ``logsumexp``.

    Raises:
        ValueError: if `threshold` is not in [0, 1) or `weights` is unknown.

    Source: arXiv:2112.14397 (its sparse phase, the dense-to-sparse gate); threshold and weights as in its released
        code.
    Differs: evaluation draws no Gumbel noise (the released code does with "gumbel" weights) and keeps the rule of
        training, where the released code goes to one expert at once. The released code dispatches with a tensor that
        is quadratic in the tokens.
    """

    needs_balance = False
    shown = ("dim", "num_experts", "temperature", "hard_from", "threshold", "weights")
    step: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        temperature: Schedule,
        *,
        scorer: ExpertScorer | None = None,
        hard_from: int | None = None,
        threshold: float = 1e-3,
        weights: Literal["gumbel", "plain"] = "gumbel",
        init_scale: float = 0.1,
    ) -> None:
        super().__init__(dim, num_experts, scorer, init_scale=init_scale)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1): got {threshold}. The released code has 0.001.")
        if weights not in ("gumbel", "plain"):
            raise ValueError(f'weights must be "gumbel" or "plain": got {weights!r}.')
        self.temperature, self.hard_from = temperature, hard_from
        self.threshold, self.weights = threshold, weights
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Draw the scorer's parameters anew, and begin at step 0."""
        super().reset_parameters()
        self.step.zero_()

    @property
    def steps_done(self) -> int:  # noqa: D102
        return int(self.step)

    @property
    def most_choices_per_token(self) -> float:
        """See `Router.most_choices_per_token`: all experts, while the temperature is high; in the end one is left."""
        return float(self.num_experts)

    def on_step_end(self, step: int) -> None:  # noqa: D102
        self.step.fill_(step)

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`: where one expert runs, as from step `hard_from`, its weight is shared."""
        soft = self.hard_from is None or (state is not None and int(state["step"]) < self.hard_from)
        if soft:
            return Compensation(
                obstacle=f"its step is before hard_from={self.hard_from}: copies keep the function while all of them "
                "run, and lose it where one is left"
            )
        return Compensation.of_best(1, copies, divided=True)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        context = context or RoutingContext()
        x = clear_padding(x, context.mask)
        logits = self.logits(x, context)
        temperature = self.temperature(self.step).to(logits)
        gate = ((logits + _gumbel(logits) if self.training else logits) / temperature).softmax(-1)
        plain = logits.softmax(-1)

        best = gate.argmax(-1, keepdim=True)
        active = torch.zeros_like(gate, dtype=torch.bool).scatter(1, best, True)
        above = gate > self.threshold
        if self.hard_from is not None:
            above = above & (self.step < self.hard_from)
        active = active | above
        if context.mask is not None:
            active = active & context.mask[:, None]
        statistics = score_statistics(logits, plain, context.mask)
        statistics["active_experts"] = masked_mean(active.sum(1).to(logits.dtype), context.mask)
        statistics["temperature"] = temperature
        losses = {"load_balance": load_balance(plain, best, mask=context.mask)}
        return routing_of_pairs(active, gate if self.weights == "gumbel" else plain, losses, statistics)


def dense_to_sparse(
    dim: int,
    num_experts: int,
    *,
    decay_steps: int = 10_000,
    start: float = 1.0,
    end: float = 0.5,
    hard_from: int | None = None,
    threshold: float = 1e-3,
    weights: Literal["gumbel", "plain"] = "gumbel",
) -> DenseToSparseRouter:
    """Dense-to-sparse gate (EvoMoE): exponential temperature, then one expert per token.

    Args:
        dim: D.
        num_experts: E.
        decay_steps: steps of the temperature's fall; ours, choose it by the length of the run.
        start: temperature at step 0; 1.0 in the released code.
        end: temperature at `decay_steps`; 0.5 in the released code.
        hard_from: step from which one expert runs; None = `decay_steps` (ours).
        threshold: 0.001, as in the released code.
        weights: "gumbel" or "plain".

    Source: arXiv:2112.14397 and its released code.
    """
    return DenseToSparseRouter(
        dim,
        num_experts,
        ExponentialDecay(start, end, decay_steps),
        hard_from=decay_steps if hard_from is None else hard_from,
        threshold=threshold,
        weights=weights,
    )


def _gumbel(like: Tensor) -> Tensor:
    """Draws from Gumbel(0, 1): -log(Exp(1)), of the shape and type of `like`."""
    return -torch.empty_like(like).exponential_().log()
