"""Taking experts of a model: fewer of them (pruning), in another order, or some of them several times (growing)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.surgery.anatomy import SparseLayer, by_tensor

State = Mapping[str, Tensor]
"""A state dict, or what an optimizer keeps for each parameter under the same names."""


def take_experts(state: State, layers: Mapping[str, SparseLayer], taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model with the chosen experts: their weights, their rows of the gates, tables that name them.

    A table (hash and task routers) that names an expert that is not taken names another afterwards: what fell to the
    experts left out is dealt to the taken ones in turn, in the order of the table. Of an expert that is taken several
    times it names the copies in turn.

    Args:
        state: tensors by name; those that the layers do not name pass through. Optimizer state works alike.
        layers: from `sparse_layers` of the model that the state is of.
        taken: Int64[m] numbers of experts for each layer; a layer that is not named stays as it is. Repetitions are
            copies.

    Raises:
        UserError: if a layer is unknown or cannot be taken apart, a number is out of range, or a tensor does not fit.

    Source: arXiv:2109.10465 (pruning of experts).
    """
    for path, numbers in taken.items():
        if path not in layers:
            raise UserError(f"there is no sparse layer {path}. There are: {', '.join(layers)}.")
        if (obstacle := layers[path].obstacle) is not None:
            raise UserError(f"the experts of {path} cannot be taken apart: {obstacle}.")
        num_experts = layers[path].num_experts
        if numbers.numel() == 0 or not 0 <= int(numbers.min()) <= int(numbers.max()) < num_experts:
            raise UserError(
                f"experts of {path} have numbers 0..{num_experts - 1}, and at least one must be taken: got "
                f"{numbers.tolist()}."
            )
    out = dict(state)
    for name, layer, dim in by_tensor(layers):
        if name in out and layer.path in taken:
            out[name] = _take(name, out[name], layer, dim, taken[layer.path])
    for path, numbers in taken.items():
        for name in layers[path].ids:
            if name in out:
                out[name] = _renumber(out[name], numbers, layers[path].num_experts)
    return out


def _take(name: str, tensor: Tensor, layer: SparseLayer, dim: int, taken: Tensor) -> Tensor:
    if tensor.ndim <= dim or tensor.shape[dim] == 0 or tensor.shape[dim] % layer.num_experts:
        raise UserError(
            f"{name} must count {layer.num_experts} experts in dimension {dim}: got shape {tuple(tensor.shape)}."
        )
    # Soft MoE has a block of slots for each expert.
    blocks = tensor.unflatten(dim, (layer.num_experts, -1))
    return blocks.index_select(dim, taken.to(tensor.device)).flatten(dim, dim + 1)


def _renumber(table: Tensor, taken: Tensor, num_experts: int) -> Tensor:
    """A table of old numbers of experts in new numbers."""
    places: list[list[int]] = [[] for _ in range(num_experts)]
    for new, old in enumerate(taken.tolist()):
        places[old].append(new)
    everybody = list(range(taken.numel()))
    turns = [0] * (num_experts + 1)  # the last counts what fell to experts left out
    renumbered = []
    for old in table.flatten().tolist():
        candidates, whose = (places[old], old) if places[old] else (everybody, num_experts)
        renumbered.append(candidates[turns[whose] % len(candidates)])
        turns[whose] += 1
    return torch.tensor(renumbered, dtype=table.dtype, device=table.device).view(table.shape)
