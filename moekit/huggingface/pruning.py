"""Fewer experts in an adopted model: a model of the same class of transformers, whose configuration says so."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.huggingface.adopt import adopt
from moekit.huggingface.adopted_layer import AdoptedLayer
from moekit.huggingface.folder import compute_buffers
from moekit.surgery import SparseLayer, choose_experts, sparse_layers, take_experts
from moekit.surgery.adapters import is_adapter
from moekit.surgery.pruning import Order

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Fields of configurations that count experts, all of which are one number for all layers."""


def prune(model: Any, kept: Mapping[str, Tensor]) -> Any:
    """The adopted model with some of its experts, as a model of its own; the first is as it was.

    Args:
        model: adopted, whole, with weights and without adapters.
        kept: Int64[m] numbers of experts by path of layer, from `choose_kept`; the same m in every layer.

    Returns:
        A model of the same class, adopted, which evaluates; all other tensors are the same objects.

    Raises:
        UserError: layers would have different numbers, fewer experts would be left than a token chooses, or groups of
            experts would not stay equal.
    """
    layers = adopted_layers(model)
    _require_even(model, layers, kept)
    count = next(iter(kept.values())).numel()
    _require_choices(model, layers, count)
    config = copy.deepcopy(model.config)
    setattr(config, _count_field(model, layers), count)
    with torch.device("meta"):
        fewer: Any = type(model)._from_config(config, dtype=model.dtype)
    adopt(fewer, aux=None)
    compute_buffers(fewer)
    fewer.load_state_dict(take_experts(model.state_dict(), layers, kept), assign=True)
    fewer.tie_weights()
    fewer.generation_config = copy.deepcopy(model.generation_config)
    return fewer.eval()


def choose_kept(
    model: Any,
    keep: int | float,
    order: Order = "utilisation",
    *,
    load: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """`moekit.surgery.choose_experts` of an adopted model, whose groups of experts stay equal.

    Raises:
        UserError: see there, and `prune`.
    """
    layers = adopted_layers(model)
    kept = choose_experts(layers, keep, order, load=load, groups=expert_groups(model), seed=seed)
    _require_even(model, layers, kept)
    _require_choices(model, layers, next(iter(kept.values())).numel())
    return kept


def adopted_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of an adopted model by path.

    Raises:
        UserError: it was not adopted, or has adapters.
    """
    layers = sparse_layers(model)
    if not layers or not any(isinstance(module, AdoptedLayer) for module in model.modules()):
        raise UserError(f"an adopted model is required: got {type(model).__name__}. Call adopt(model) first.")
    if any(is_adapter(name) for name, _ in model.named_parameters()):
        raise UserError(f"{type(model).__name__} has adapters: merge them first (moekit.surgery.merge_adapters).")
    return layers


def expert_groups(model: Any) -> int:
    """Groups of neighbours among which the routers of an adopted model choose (DeepSeek); 1 = there are none."""
    config = model.config
    grouped = config.model_type == "deepseek_v3" or getattr(config, "topk_method", "") == "group_limited_greedy"
    return int(config.n_group) if grouped else 1


def _require_even(model: Any, layers: Mapping[str, SparseLayer], kept: Mapping[str, Tensor]) -> None:
    """Raise UserError unless every layer keeps as many experts."""
    if set(kept) != set(layers):
        raise UserError(
            f"experts must be chosen for every sparse layer, {', '.join(layers)}: got {', '.join(kept) or 'none'}."
        )
    counts = {path: numbers.numel() for path, numbers in kept.items()}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=lambda path: counts[path]), max(counts, key=lambda path: counts[path])
        raise UserError(
            f"{type(model).__name__} has one number of experts for all layers ({_count_field(model, layers)}): got "
            f"{counts[few]} for {few} and {counts[many]} for {many}. No architecture that is adopted can say a number "
            "for each layer: keep as many in every layer."
        )


def _require_choices(model: Any, layers: Mapping[str, SparseLayer], count: int) -> None:
    """Raise UserError unless a token finds as many experts as it chooses, in the groups that it may use."""
    k = max(int(layer.k) for layer in layers.values())
    if count < k:
        raise UserError(f"keep at least {k} experts, a token of {type(model).__name__} chooses as many: got {count}.")
    if (groups := expert_groups(model)) > 1:
        used, each = int(model.config.topk_group), count // groups
        best = 2 if model.config.model_type == "deepseek_v3" else 1  # whose groups are ranked by so many experts
        if count % groups or used * each < k or each < best:
            least = groups * max(-(-k // used), best)
            raise UserError(
                f"{type(model).__name__} has {groups} equal groups of experts, and a token chooses {k} in {used} of "
                f"them: got {count} experts. Keep a multiple of {groups}, at least {least}."
            )


def _count_field(model: Any, layers: Mapping[str, SparseLayer]) -> str:
    num_experts = next(iter(layers.values())).num_experts
    said = model.config.to_dict()
    return next(name for name in _COUNTS if said.get(name) == num_experts)
