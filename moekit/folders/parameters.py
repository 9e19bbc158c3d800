"""Which parameters of a model train, by layer and by what they are for; and adapters that reach no expert."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from moekit.experts import is_expert_bank
from moekit.routing import Router
from moekit.surgery.adapters import Target, is_adapter, is_dense_part

KINDS = ("experts", "routers", "attention", "feed_forward", "other")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class TrainedPart:
    """Trained parameters of one place.

    Attributes:
        layer: the number of the transformer block; None = outside of the blocks.
        kind: one of `KINDS`.
        count: how many numbers train.
        num_experts: how many experts share them; None = it is no expert bank.
    """

    layer: int | None
    kind: str
    count: int
    num_experts: int | None = None

    def __str__(self) -> str:
        if self.num_experts is None:
            return f"{self.kind} {self.count:,}"
        return f"{self.kind} {self.num_experts} x {self.count // self.num_experts:,}"


def trained_parameters(model: nn.Module) -> list[TrainedPart]:
    """What trains, in the order of the layers; a model on the meta device will do."""
    owners = dict(_owners(model))
    found: dict[tuple[int | None, str, int | None], int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind, experts = owners.get(name, ("other", None))
            at = _LAYER.search(name)
            place = (int(at[1]) if at else None, kind, experts)
            found[place] = found.get(place, 0) + parameter.numel()
    made = [TrainedPart(layer, kind, count, experts) for (layer, kind, experts), count in found.items()]
    return sorted(made, key=lambda one: (one.layer is None, one.layer or 0, KINDS.index(one.kind)))


def counts(model: nn.Module) -> dict[str, int]:
    """How many parameters there are, ``total``, and how many of them train, ``trained``."""
    trained = sum(part.count for part in trained_parameters(model))
    return {"total": sum(parameter.numel() for parameter in model.parameters()), "trained": trained}


def said_of(model: nn.Module) -> list[str]:
    """Lines for the user: the sum, and what trains in which layers, alike ones together."""
    parts, numbers = trained_parameters(model), counts(model)
    by_layer: dict[int | None, list[str]] = {}
    for part in parts:
        by_layer.setdefault(part.layer, []).append(str(part))
    lines = [f"{numbers['trained']:,} of {numbers['total']:,} parameters train"]
    for words, group in itertools.groupby(by_layer.items(), key=lambda item: (item[0] is None, ", ".join(item[1]))):
        layers = [layer for layer, _ in group if layer is not None]
        where = "outside layers" if words[0] else _range(layers)
        lines.append(f"{where}: {words[1]}")
    return lines


def unreached(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """What is to be said of adapters that do not do what their names promise.

    Args:
        model: with its adapters.
        targets: what was to be adapted.
    """
    adapted = {kind for name, (kind, _) in _owners(model) if is_adapter(name)}
    said = [
        f"adapters on {target} reach nothing: {type(model).__name__} has no matrix of that kind."
        for target in targets
        if target not in adapted
    ]
    if "experts" not in adapted:
        parts = [target for target in targets if target in adapted]
        said.append(f"no adapter reaches an expert: those on {', '.join(parts)} leave all experts as they are.")
    return said


def _owners(model: nn.Module) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """Kind and number of experts of every parameter that has one, by name; inner modules come later and count."""
    for path, module in model.named_modules():
        found: tuple[str, int | None] | None = None
        if is_expert_bank(module):
            found = ("experts", int(module.num_experts))
        elif isinstance(module, Router):
            found = ("routers", None)
        else:
            kinds = [kind for kind in ("attention", "feed_forward") if is_dense_part(module, kind)]
            found = (kinds[0], None) if kinds else None
        if found:
            for name, _ in module.named_parameters():
                yield (f"{path}.{name}" if path else name), found


def _range(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}, each"
    return f"layers {', '.join(map(str, layers))}, each"
