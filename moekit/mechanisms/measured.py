"""All mechanisms of a trace in one pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.errors import UserError
from moekit.mechanisms.information import MutualInformation, mutual_information
from moekit.mechanisms.quantities import (
    active_experts,
    coactivation,
    drops_by_place,
    effective_experts,
    places,
    saturation,
)
from moekit.routing import Routing, routing_stats
from moekit.routing_traces import RoutingTrace, TracedLayer

VERSION = 1
BINS = 10
"""Parts of a batch, by the place of tokens in it, for which drops are counted."""
LABELS = ("language", "task", "token")


@dataclass(frozen=True)
class LayerMechanisms:
    """What one sparse layer does. Lists over time have an entry for each step of `Mechanisms.steps`, None = not known.

    Attributes:
        num_experts: E.
        load: share of assignments that each expert was asked for, at the last step.
        drop_rate: share of assignments that found no room, over time.
        drops_by_place: the same at the last step, by the place of tokens in the batch, in tenths from its beginning;
            None where no token is.
        experts_per_token: mean number of experts that a token asks, over time.
        active_experts: over time.
        effective_experts: exp of the entropy of the load, over time.
        information: mutual information of the expert with language, task and token at the last step, of those that are
            known and not all the same.
        coactivation: E rows of E, share of an expert's tokens (row) that another (column) has too, at the last step.
        saturation: share of a token's choices at the last step that were made before, over time; None where the same
            tokens were not recorded at other steps.
        logits: mean of the logsumexp of the router's logits, over time.
        gradients: mean of the experts' gradient norms, over time.
        gradient_spread: the largest over the mean of them, over time.
    """

    num_experts: int
    load: Sequence[float]
    drop_rate: Sequence[float | None]
    drops_by_place: Sequence[float | None]
    experts_per_token: Sequence[float | None]
    active_experts: Sequence[int]
    effective_experts: Sequence[float]
    information: Mapping[str, MutualInformation]
    coactivation: Sequence[Sequence[float]]
    saturation: Sequence[float | None] | None
    logits: Sequence[float | None]
    gradients: Sequence[float | None]
    gradient_spread: Sequence[float | None]


@dataclass(frozen=True)
class Mechanisms:
    """What the sparse layers of a model do.

    Attributes:
        steps: optimizer steps at which routing was recorded.
        layers: by name.
    """

    steps: Sequence[int]
    layers: Mapping[str, LayerMechanisms]

    @property
    def means(self) -> dict[str, Any]:
        """Means over layers of what is one number, as tables of an ablation ask for it.

        ``saturation`` is the mean over the steps before the last: how early choices were what they became.
        """

        def mean(values: Sequence[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return sum(known) / len(known) if known else None

        layers = self.layers.values()
        found: dict[str, Any] = {
            "saturation": mean([mean(layer.saturation[:-1]) for layer in layers if layer.saturation]),
            "drop_rate": mean([layer.drop_rate[-1] for layer in layers]),
            "experts_per_token": mean([layer.experts_per_token[-1] for layer in layers]),
            "active_experts": mean([layer.active_experts[-1] / layer.num_experts for layer in layers]),
            "effective_experts": mean([layer.effective_experts[-1] / layer.num_experts for layer in layers]),
            "late_drops": mean([_late(layer.drops_by_place) for layer in layers]),
            "coactivation": mean([_most_together(layer.coactivation) for layer in layers]),
            "logits": mean([layer.logits[-1] for layer in layers]),
            "gradient_spread": mean([layer.gradient_spread[-1] for layer in layers]),
        }
        known = {what: mean([m.information[what].above for m in layers if what in m.information]) for what in LABELS}
        return {
            **{name: value for name, value in found.items() if value is not None},
            "mutual_information": {name: value for name, value in known.items() if value is not None},
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data: the means, and all layers."""
        layers = {name: dataclasses.asdict(layer) for name, layer in self.layers.items()}
        return {"version": VERSION, "steps": list(self.steps), **self.means, "layers": layers}


def _late(drops: Sequence[float | None]) -> float | None:
    """Drop rate in the last third of the batch less that in its first third."""
    third = len(drops) // 3
    first, last = ([d for d in part if d is not None] for part in (drops[:third], drops[-third:]))
    return sum(last) / len(last) - sum(first) / len(first) if first and last else None


def _most_together(shares: Sequence[Sequence[float]]) -> float | None:
    """Mean over experts of the largest share of tokens that one other expert has too; None with one choice."""
    most = [max((s for other, s in enumerate(row) if other != own), default=0.0) for own, row in enumerate(shares)]
    return sum(most) / len(most) if most and max(most) > 0 else None


@dataclass
class _AtStep:
    """What is counted of a layer at one step."""

    load: Tensor
    kept: int = 0
    tokens: int = 0
    logits: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    same: int = 0
    compared: int = 0


class _Layer:
    """What is counted of a layer."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.steps: dict[int, _AtStep] = {}
        self.asked, self.dropped = torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.int64)
        self.tables: dict[str, dict[int, NDArray[np.int64]]] = {what: {} for what in LABELS}
        self.together = torch.zeros(num_experts, num_experts, dtype=torch.int64)

    def count(self, step: int, layer: TracedLayer, gradients: Tensor | None) -> None:
        routing = layer.routing
        at = self.steps.setdefault(step, _AtStep(torch.zeros(self.num_experts, dtype=torch.int64)))
        stats = routing_stats(routing)
        at.load += stats.load
        at.kept += int(stats.kept.sum())
        at.tokens += int(routing.token[routing.queued].unique().numel())
        if (size := routing.statistics.get("logsumexp")) is not None and math.isfinite(size):
            at.logits.append(float(size))
        if gradients is not None:
            at.gradients.append(gradients)

    def count_last(self, layer: TracedLayer, task: int) -> None:
        """What is known of the last step alone."""
        routing, tokens = layer.routing, layer.tokens
        asked, dropped = drops_by_place(routing, places(tokens.mask, routing.num_tokens, BINS), BINS)
        self.asked += asked
        self.dropped += dropped
        self.together += coactivation(routing)
        labels = {
            "language": tokens.language, "token": tokens.ids, "task": torch.full((routing.num_tokens,), task)
        }  # fmt: skip
        for what, values in labels.items():
            if values is not None:
                self._tabulate(self.tables[what], routing, values)

    def _tabulate(self, table: dict[int, NDArray[np.int64]], routing: Routing, labels: Tensor) -> None:
        label = labels[routing.token][routing.queued].numpy()
        expert = routing.expert[routing.queued].numpy()
        known, row = np.unique(label, return_inverse=True)
        cells = np.bincount(row * self.num_experts + expert, minlength=len(known) * self.num_experts)
        for name, counts in zip(known.tolist(), cells.reshape(-1, self.num_experts), strict=True):
            table[name] = table[name] + counts if name in table else counts

    def add_saturation(self, found: Sequence[tuple[int, int, int]]) -> None:
        """Choices of one forward that are those of the last step, and all of them, by step."""
        for step, same, choices in found:
            self.steps[step].same += same
            self.steps[step].compared += choices

    def made(self, steps: Sequence[int]) -> LayerMechanisms:
        none = _AtStep(torch.zeros(self.num_experts, dtype=torch.int64))
        over = [self.steps.get(step, none) for step in steps]
        load = over[-1].load.double()
        own = self.together.diagonal().clamp_min(1)
        tables = {what: np.stack(list(rows.values())) for what, rows in self.tables.items() if len(rows) > 1}
        gradients = [torch.stack(at.gradients).mean(0) if at.gradients else None for at in over]
        return LayerMechanisms(
            num_experts=self.num_experts,
            load=(load / load.sum().clamp_min(1)).tolist(),
            drop_rate=[1 - at.kept / int(at.load.sum()) if bool(at.load.sum()) else None for at in over],
            drops_by_place=[
                lost / asked if asked else None
                for lost, asked in zip(self.dropped.tolist(), self.asked.tolist(), strict=True)
            ],
            experts_per_token=[int(at.load.sum()) / at.tokens if at.tokens else None for at in over],
            active_experts=[active_experts(at.load) for at in over],
            effective_experts=[effective_experts(at.load) for at in over],
            information={what: mutual_information(table) for what, table in tables.items()},
            coactivation=(self.together / own[:, None]).tolist(),
            saturation=[at.same / at.compared if at.compared else None for at in over]
            if any(at.compared for at in over)
            else None,
            logits=[sum(at.logits) / len(at.logits) if at.logits else None for at in over],
            gradients=[None if found is None else float(found.mean()) for found in gradients],
            gradient_spread=[
                None if found is None or not bool(found.mean() > 0) else float(found.max() / found.mean())
                for found in gradients
            ],
        )


def mechanisms(trace: RoutingTrace) -> Mechanisms:
    """All mechanisms of a trace.

    Saturation compares the n-th forward of each step with the n-th of the last step, so it needs the same text at every
    step, as validation is, and at least two steps. Forwards whose tokens are not the same at all steps do not count,
    such as those of text that the model has written.

    Args:
        trace: of one or more steps.

    Raises:
        UserError: no forward is in it, or the file is damaged.
    """
    if not len(trace):
        raise UserError("mechanisms need a trace with at least one forward: this one has none.")
    steps, tasks = sorted(set(trace.steps)), sorted(set(trace.tasks))
    layers = {name: _Layer(experts) for name, experts in trace.layers.items()}
    # The n-th forwards of all steps side by side, the last step's first: one of them is in memory beside it.
    by_step = {step: [number for number, at in enumerate(trace.steps) if at == step] for step in reversed(steps)}
    for turn in range(max(map(len, by_step.values()))):
        side_by_side = [numbers[turn] for numbers in by_step.values() if turn < len(numbers)]
        last, compared = trace[side_by_side[0]], len(side_by_side) == len(steps) > 1
        same: dict[str, list[tuple[int, int, int]]] = {name: [] for name in last.layers}
        for number in side_by_side:
            batch = trace[number]
            for name, layer in batch.layers.items():
                layers[name].count(batch.step, layer, batch.gradients.get(name))
                if batch.step == steps[-1]:
                    layers[name].count_last(layer, tasks.index(batch.task))
                if compared and name in same and _same_tokens(layer, last.layers[name]):
                    same[name].append((batch.step, *saturation(layer.routing, last.layers[name].routing)))
        for name, found in same.items():
            if len(found) == len(steps) > 1:
                layers[name].add_saturation(found)
    return Mechanisms(steps, {name: layer.made(steps) for name, layer in layers.items()})


def _same_tokens(one: TracedLayer, other: TracedLayer) -> bool:
    """Whether two routings are of the same tokens as far as is known."""
    if one.routing.num_tokens != other.routing.num_tokens:
        return False
    ids, others = one.tokens.ids, other.tokens.ids
    return ids is None or others is None or torch.equal(ids, others)
