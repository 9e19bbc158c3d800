"""Bytes of each device, by formula.

What a device holds of a weight follows from three divisions, one after the other: expert parallelism divides the
experts of a layer, tensor parallelism divides heads, hidden channels and vocabulary, ZeRO divides what data-parallel
devices would otherwise repeat. How much ZeRO divides depends on its stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekit.parallel.layout import Layout, Optimizer, Training, zero_dimension
from moekit.parallel.plan import AXES
from moekit.planner.census import Census, GatheredUnit, Weight

TENSOR_AXES = {axis for axis, dimension in AXES.items() if dimension == "tensor"}
"""Logical axes that tensor parallelism divides."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the fullest device, and of its share of host memory.

    Attributes:
        weights: those stored between steps.
        gradients: those stored between backward and step.
        optimizer: the optimizer's statistics and, where there is one, its copy of the weights.
        working: copies of weights, and whole gradients, that exist in a step only: what is gathered and converted.
        activations: kept for backward, with the largest block's second computation under checkpointing.
        host: what is offloaded, and the copies of weights and gradients that an offloaded optimizer works on.
    """

    weights: float
    gradients: float
    optimizer: float
    working: float
    activations: float
    host: float

    @property
    def device(self) -> float:
        """All of the device's."""
        return self.weights + self.gradients + self.optimizer + self.working + self.activations


def local_shape(weight: Weight, layout: Layout) -> tuple[int, ...]:
    """What a device computes with: the weight after expert and tensor parallelism, before ZeRO; uneven parts up."""
    shape = list(weight.shape)
    if weight.is_expert:
        shape[0] = math.ceil(shape[0] / layout.expert_parallel_size)
    for dim, axis in enumerate(weight.axes):
        if axis in TENSOR_AXES:
            shape[dim] = math.ceil(shape[dim] / layout.tensor_parallel_size)
            break
    return tuple(shape)


def zero_cut(weight: Weight, layout: Layout) -> int | None:
    """The dimension that ZeRO divides; None = it cannot."""
    shape = local_shape(weight, layout)
    taken = {dimension for dimension, length in enumerate(shape) if length != weight.shape[dimension]}
    return zero_dimension(shape, taken, sharers(weight, layout)) if shape else None


def sharded_shape(weight: Weight, layout: Layout) -> tuple[int, ...]:
    """What a device stores where ZeRO divides too; uneven parts up."""
    shape, cut = list(local_shape(weight, layout)), zero_cut(weight, layout)
    if cut is not None:
        shape[cut] = math.ceil(shape[cut] / sharers(weight, layout))
    return tuple(shape)


def sharers(weight: Weight, layout: Layout) -> int:
    """Devices among which ZeRO divides a weight."""
    return layout.expert_shard_size if weight.is_expert else layout.shard_size


def optimizer_numbers(shape: tuple[int, ...], optimizer: Optimizer) -> int:
    """Statistics that an optimizer keeps for a weight of that shape."""
    numel = math.prod(shape)
    # Of a matrix Adafactor keeps one number for each row and one for each column.
    factored = numel if len(shape) < 2 else numel // max(shape[-1], 1) + numel // max(shape[-2], 1)
    return {"adamw": 2 * numel, "momentum": numel, "sgd": 0, "adafactor": factored}[optimizer]


def memory_of(census: Census, layout: Layout, training: Training) -> Memory:
    """Bytes of the fullest device."""
    numbers, stage = training.numbers, layout.zero_stage
    stored = sharded_shape if stage >= 2 else local_shape
    owned = sharded_shape if stage >= 1 else local_shape  # by the optimizer
    num_stored = census.total(lambda weight: math.prod(stored(weight, layout)))
    # Stage 2 divides gradients in the last micro-batch of a step.
    summed = local_shape if stage == 2 and training.accumulate > 1 else stored
    num_learned = census.total(lambda weight: weight.trained * math.prod(summed(weight, layout)))
    num_owned = census.total(lambda weight: weight.trained * math.prod(owned(weight, layout)))
    statistics = census.total(
        lambda weight: weight.trained * optimizer_numbers(owned(weight, layout), training.optimizer)
    )
    weights, gradients = float(numbers.weight * num_stored), float(numbers.gradient * num_learned)
    optimizer = float(numbers.state * statistics + numbers.master * num_owned)
    host = 0.0
    if layout.offload != "none":
        host, optimizer = optimizer, 0.0
    if layout.offload == "optimizer":  # which works on copies
        host += (numbers.gradient + (0 if numbers.master else numbers.weight)) * num_owned
    if layout.offload == "parameters":
        host, weights, gradients = host + weights + gradients, 0.0, 0.0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        working=_working(census, layout, training),
        activations=_activations(census, layout, training),
        host=host,
    )


def _working(census: Census, layout: Layout, training: Training) -> float:
    """Bytes of weights and gradients that exist in a step only.

    `fully_shard` computes with copies of the stored weights, divided or not, which blocks take in a type of their own.
    Stage 2 keeps all of them from forward to backward; the others those of a block and of the next one, which is
    fetched meanwhile, and what belongs to no block. Gradients of a block, or of what belongs to none, are whole before
    they are divided. Without it there are no copies but autocast's, of all weights, which are kept for backward.
    """
    numbers = training.numbers
    if training.plain:
        copied = numbers.compute if numbers.compute < numbers.weight else 0
        return float(copied * census.total(lambda weight: math.prod(local_shape(weight, layout))))
    largest = others = blocks = learned = learned_others = 0
    for unit in census.units:
        sizes = [math.prod(local_shape(weight, layout)) for weight in unit.weights]
        size = sum(sizes)
        trained = sum(n for n, weight in zip(sizes, unit.weights, strict=True) if weight.trained)
        if unit.kind == "block":
            largest, learned = max(largest, size), max(learned, trained)
            blocks += unit.count * size
        else:
            others += unit.count * size
            learned_others += unit.count * trained
    held = blocks if layout.zero_stage == 2 else min(2 * largest, blocks)
    whole_gradients = max(learned, learned_others) if layout.zero_stage >= 2 else 0
    outside = numbers.weight + numbers.converted
    return float(numbers.gathered * held + outside * others + numbers.gradient * whole_gradients)


def _activations(census: Census, layout: Layout, training: Training) -> float:
    """Bytes kept when backward begins, and what it adds at its fullest."""
    numbers, tp = training.numbers, layout.tensor_parallel_size

    def kept(unit: GatheredUnit) -> float:
        return unit.cost.kept_bytes(numbers, tp)

    blocks = [unit for unit in census.units if unit.kind == "block"]
    others = sum(u.count * kept(u) for u in census.units if u.kind != "block")
    # Log-probabilities and their gradient in float32, and logits where products have a type of their own.
    each = 8 + (numbers.compute if numbers.compute < 4 else 0)
    # Tensor-parallel partners each hold all of them: they gather their parts before the loss.
    logits = each * max((unit.logits for unit in census.units), default=0.0)
    if not training.checkpointing:
        return others + sum(unit.count * kept(unit) for unit in blocks) + logits
    entries = sum(unit.count * unit.entry * numbers.stream for unit in blocks)
    # Blocks are computed again one by one, after the logits have gone.
    return others + entries + max(logits, max((kept(unit) for unit in blocks), default=0.0))
