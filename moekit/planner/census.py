"""What a model consists of: its weights, and its blocks with what they cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from moekit.layer import MoELayer
from moekit.parallel.layout import Training
from moekit.planner.costs import Cost, block_cost, linear_cost
from moekit.planner.shape import TransformerShape
from moekit.transformer import Side
from moekit.transformer.block import Block
from moekit.transformer.embedding import TokenEmbedding
from moekit.transformer.models import DecoderOnly, EncoderDecoder, EncoderOnly
from moekit.transformer.stack import Stack

Kind = Literal["block", "vocabulary", "rest"]


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        shape: its sizes.
        axes: logical names of its dimensions; empty = unnamed, never divided by tensor parallelism.
        active: the share of it that one token passes: k / E of an expert bank, else 1.
        most_active: the same at the step of training that has most experts for a token.
        trained: whether it has a gradient, and the optimizer's numbers.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()
    active: float = 1.0
    most_active: float = 1.0
    trained: bool = True

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether it is one of the experts' own: divided by expert parallelism."""
        return bool(self.axes) and self.axes[0] == "expert"


@dataclass(frozen=True)
class GatheredUnit:
    """Weights that are gathered, computed and forgotten together, `count` times in the model.

    Attributes:
        kind: "block", "vocabulary" (table and logits) or "rest".
        name: for tables.
        weights: its parameters.
        cost: what each costs in a micro-batch.
        entry: numbers of the residual stream at its beginning: all that checkpointing keeps of a block.
        logits: numbers of the scores over the vocabulary that it makes.
        count: how many equal ones there are.
    """

    kind: Kind
    name: str
    weights: tuple[Weight, ...]
    cost: Cost
    entry: float = 0.0
    logits: float = 0.0
    count: int = 1


@dataclass(frozen=True)
class Census:
    """A model in units, which together are all of it."""

    name: str
    units: tuple[GatheredUnit, ...]

    def total(self, number: Callable[[Weight], float]) -> float:
        """The sum of a number of each weight over the whole model."""
        return sum(unit.count * number(weight) for unit in self.units for weight in unit.weights)

    @property
    def parameters(self) -> int:
        """Numbers to learn."""
        return round(self.total(lambda weight: weight.numel))

    @property
    def active_parameters(self) -> int:
        """Those that one token passes: k of a layer's E experts, and everything else."""
        return round(self.total(lambda weight: weight.numel * weight.active))

    @property
    def most_active_parameters(self) -> int:
        """The same at the step of training that has most experts for a token."""
        return round(self.total(lambda weight: weight.numel * weight.most_active))

    @property
    def expert_parameters(self) -> int:
        """Those of experts."""
        return round(self.total(lambda weight: weight.numel * weight.is_expert))

    @property
    def forward_flops(self) -> float:
        """Floating-point operations of one forward of a micro-batch."""
        return sum(unit.count * unit.cost.flops for unit in self.units)

    @property
    def trained_parameters(self) -> int:
        """Those that have gradients."""
        return round(self.total(lambda weight: weight.numel * weight.trained))

    @property
    def training_flops(self) -> float:
        """Operations of forward and backward of a micro-batch: three times the forward's, less what is frozen."""
        return 3 * self.forward_flops - sum(unit.count * unit.cost.frozen for unit in self.units)

    @property
    def fewest_experts(self) -> int | None:
        """Experts in the layer that has the fewest; None = no experts."""
        return min((w.shape[0] for u in self.units for w in u.weights if w.is_expert), default=None)


def take_census(model: TransformerShape | nn.Module, training: Training) -> Census:
    """Weights and costs of `model` for micro-batches of `training`.

    Args:
        model: numbers, or a module that contains a moekit transformer (a model, or a LightningModule around one); on
            the meta device it costs no memory. Its blocks, tables and logits are counted by formula; other modules
            (heads, say) as their linear layers applied to every token: an upper bound.
        training: micro-batch and precision.

    Raises:
        ValueError: if there is no transformer in the module.
    """
    if isinstance(model, TransformerShape):
        return _of_shape(model, training)
    units = counted(_units(model, training))
    if not any(unit.kind == "block" for unit in units):
        raise ValueError(
            f"the planner counts costs of moekit's transformers (EncoderDecoder, EncoderOnly, DecoderOnly): got "
            f"{type(model).__name__}, which contains none. Describe the model as a TransformerShape, or count it with "
            "measure(module, *inputs)."
        )
    return Census(type(model).__name__, units)


def _of_shape(shape: TransformerShape, training: Training) -> Census:
    found: list[GatheredUnit] = []
    for unit in counted(_units(shape.shortened().module(), training)):
        if unit.kind == "block":
            side: Side = "decoder" if unit.name.startswith("decoder") else "encoder"
            sparse = any(weight.is_expert for weight in unit.weights)
            unit = replace(unit, count=shape.count_layers(side, sparse=sparse))
        found.append(unit)
    return Census(shape.name, tuple(unit for unit in found if unit.count))


def counted(units: Iterable[GatheredUnit]) -> tuple[GatheredUnit, ...]:
    """Equal units once, with their number."""
    return tuple(replace(unit, count=count) for unit, count in Counter(units).items())


def weights_of(module: nn.Module, taken: set[int]) -> tuple[Weight, ...]:
    """The parameters under `module` that are not in `taken` (by id), which they enter; axes from annotations."""
    axes: dict[int, tuple[str, ...]] = {}
    active: dict[int, tuple[float, float]] = {}
    for owner in module.modules():
        named: Any = getattr(owner, "axes", None)
        if isinstance(named, Mapping):
            inside = dict(owner.named_parameters())
            axes |= {id(inside[name]): tuple(names) for name, names in named.items() if name in inside}
        if isinstance(owner, MoELayer):
            router = owner.router
            shares = (router.choices_per_token / router.num_experts, router.most_choices_per_token / router.num_experts)
            active |= {id(p): shares for p in owner.experts.parameters()}
    found = {
        id(p): Weight(tuple(p.shape), axes.get(id(p), ()), *active.get(id(p), (1.0, 1.0)), p.requires_grad)
        for p in module.parameters()
    }
    new = tuple(weight for key, weight in found.items() if key not in taken)
    taken |= set(found)
    return new


def _units(model: nn.Module, training: Training) -> Iterator[GatheredUnit]:
    """Blocks, then tables with the logits they make, then whatever is left."""
    taken: set[int] = set()
    parts = list(model.modules())
    stacks = [part for part in parts if isinstance(part, Stack)]
    for stack in stacks:
        for block in stack.blocks:
            yield _block(block, stack.causal, training, taken)
    for part in parts:
        if isinstance(part, EncoderDecoder | DecoderOnly | EncoderOnly):
            yield _vocabulary(part, training, taken)
    counted: set[nn.Module] = {part for part in parts if isinstance(part, TokenEmbedding)}
    counted.update(part for stack in stacks for part in stack.modules())
    heads = [part for part in parts if isinstance(part, nn.Linear) and part not in counted]
    costs = [linear_cost(head, training.source_tokens + training.target_tokens) for head in heads]
    # Final norms keep the stream once more.
    for stack in stacks:
        if stack.blocks:
            t = training.target_tokens if stack.causal else training.source_tokens
            costs.append(Cost(stream=t * stack.blocks[0].self_attention.qkv.in_features, wide=2 * t))
    # Cross-attention keeps the memory: all layers one, unless each converts it for itself (`attention_cost`).
    if training.numbers.stream == training.numbers.compute:
        memories = [training.source_tokens * part.dim for part in parts if isinstance(part, EncoderDecoder)]
        costs.append(Cost(compute=float(sum(memories))))
    yield GatheredUnit("rest", "norms and heads", weights_of(model, taken), sum(costs, Cost()))


def _block(block: Block, causal: bool, training: Training, taken: set[int]) -> GatheredUnit:
    tokens = training.target_tokens if causal else training.source_tokens
    kind = "sparse block" if isinstance(block.feed_forward, MoELayer) else "block"
    return GatheredUnit(
        "block",
        f"{'decoder' if causal else 'encoder'} {kind}",
        weights_of(block, taken),
        block_cost(block, causal, training),
        entry=float(tokens * block.self_attention.qkv.in_features),
    )


def _vocabulary(model: EncoderDecoder | DecoderOnly | EncoderOnly, training: Training, taken: set[int]) -> GatheredUnit:
    """Tables and logits: 2 T D V, for every token of the side that predicts."""
    t = training.source_tokens if isinstance(model, EncoderOnly) else training.target_tokens
    tables = [m for m in (model.embedding, getattr(model, "target_embedding", None), model.output) if m is not None]
    weights = sum((weights_of(table, taken) for table in tables), ())
    v, d = model.vocab_size, model.dim
    read = t if isinstance(model, DecoderOnly | EncoderOnly) else training.source_tokens + training.target_tokens
    # Where the table is divided, vectors are sums over partners, and so are the gradients of what makes logits.
    summed = {"summed_forward": float(read * d), "summed_backward": float(t * d)}
    cost = Cost(flops=2.0 * t * d * v, compute=float(t * d), **summed)
    return GatheredUnit("vocabulary", "tables and logits", weights, cost, logits=float(t * v))


def parameters(backbone: nn.Module) -> dict[str, int]:
    """Parameters of a network: all, and those that one token passes (k of an expert bank's E experts)."""
    total = sum(p.numel() for p in backbone.parameters())
    idle = 0
    for layer in backbone.modules():
        if isinstance(layer, MoELayer):
            share = layer.router.choices_per_token / layer.router.num_experts
            idle += round(sum(p.numel() for p in layer.experts.parameters()) * (1 - share))
    return {"total": total, "active": total - idle}
