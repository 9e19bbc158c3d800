"""Where a model of transformers has its experts, how many, and what a token passes: read without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moekit.huggingface.adopted_layer import AdoptedLayer, Hearing
from moekit.huggingface.folder import on_meta
from moekit.huggingface.sparse_blocks import SPARSE_BLOCKS, adopted


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """A sparse layer.

    Attributes:
        path: its dotted name.
        router: the class of the router that computes it here.
        num_experts: E.
        k: experts of a token.
        expert_parameters: numbers of one expert.
    """

    path: str
    router: str
    num_experts: int
    k: int
    expert_parameters: int


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """The experts of a model.

    Attributes:
        architecture: the class of transformers.
        layers: the sparse layers; none of a dense model.
        parameters: numbers of the whole model, shared ones once.
    """

    architecture: str
    layers: Sequence[ExpertLayer]
    parameters: int

    @property
    def of_experts(self) -> int:
        """Those of experts."""
        return sum(layer.num_experts * layer.expert_parameters for layer in self.layers)

    @property
    def active(self) -> int:
        """Those that one token passes: k of a layer's E experts, and everything else."""
        return self.parameters - sum((e.num_experts - e.k) * e.expert_parameters for e in self.layers)


def folder_layout(folder: Path) -> ExpertLayout:
    """The layout that a folder's config.json describes.

    Raises:
        UserError: transformers does not know it, or its sparse blocks are none that are adopted.
    """
    return layout_of(on_meta(folder, None))


def layout_of(model: nn.Module) -> ExpertLayout:
    """The layout of a model, adopted or not, which may be on the meta device.

    Raises:
        UserError: its sparse blocks are none that are adopted.
    """
    config, hearing = getattr(model, "config", None), Hearing()
    found = []
    for path, module in model.named_modules():
        block: Any = module
        if isinstance(block, AdoptedLayer):
            layer = block
        elif type(block).__name__ in SPARSE_BLOCKS:
            layer = adopted(block, hearing, config)
        else:
            continue
        router: Any = layer.router
        size = sum(parameter.numel() for parameter in block.experts.parameters()) // layer.num_experts
        found.append(
            ExpertLayer(
                path=path,
                router=type(router).__name__,
                num_experts=layer.num_experts,
                k=int(router.k),
                expert_parameters=size,
            )
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    return ExpertLayout(architecture=type(model).__name__, layers=found, parameters=total)
