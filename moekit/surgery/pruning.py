"""Choosing experts and taking them: fewer of them (pruning), in another order, or some of them several times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.surgery.sparse_layer import SparseLayer, State, expert_tensors

Order = Literal["utilisation", "reversed", "random", "reap"]


def count_kept(layers: Mapping[str, SparseLayer], keep: int | float) -> dict[str, int]:
    """How many experts stay in each layer.

    Args:
        layers: The result of `sparse_layers`.
        keep: The number to keep: an int = that many in every layer; a float in (0, 1] = that share of each layer's,
            rounded to the nearest (halves up), and never fewer than a token chooses.

    Raises:
        UserError: if a layer has not so many, a token chooses more, the number or share is not positive, or the share
            is over 1.
    """
    if not keep > 0 or (isinstance(keep, float) and keep > 1):  # NaN is not greater than anything
        raise UserError(f"keep must be a number of experts, or a share of them above 0 and up to 1.0: got {keep}.")
    counts = {}
    for path, layer in layers.items():
        least = max(1, int(layer.k))
        if isinstance(keep, float):
            counts[path] = max(least, int(keep * layer.num_experts + 0.5))
            continue
        if keep > layer.num_experts:
            raise UserError(f"keep at most {layer.num_experts} experts of {path}, it has no more: got keep={keep}.")
        if keep < least:
            raise UserError(f"keep at least {least} experts of {path}, a token chooses as many: got keep={keep}.")
        counts[path] = keep
    return counts


def parse_amount(text: str) -> int | float:
    """An amount of experts, as `count_kept` takes it: ``4``, ``0.5`` or ``50%``.

    Raises:
        ValueError: it is none of these.
    """
    if text.endswith("%"):
        return float(text.removesuffix("%")) / 100
    return int(text) if text.strip("+-").isdecimal() else float(text)


def choose_experts(
    layers: Mapping[str, SparseLayer],
    keep: int | float,
    order: Order = "utilisation",
    *,
    load: Mapping[str, Tensor] | None = None,
    groups: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Numbers of the experts to keep in each layer, ascending.

    Args:
        layers: The result of `sparse_layers`.
        keep: The number or share to keep; see `count_kept`.
        order: "utilisation" keeps those with the highest load (of equal ones the first), "reversed" those with the
            lowest, "reap" those with the highest saliency, "random" draws without replacement.
        load: Float[E] for each layer: how much each expert is used, overall or for the language or task that the
            specialist is for; for "reap" `moekit.surgery.ExpertUse.saliency`. Not needed at random.
        groups: The number of groups of neighbours that routers choose among (DeepSeek): each keeps as many. A share is
            rounded to such a number.
        seed: The seed of a random choice.

    Returns:
        Int64[m] by layer.

    Raises:
        UserError: see `count_kept`; there is no load of E entries for a layer, or groups cannot stay equal.

    Source: arXiv:2109.10465 (a model pruned to some of its experts, at random or by utilisation); arXiv:2510.13999
        (by saliency). Differs: the texts were not at hand; how ties and shares are resolved, and groups, are ours.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for path, count in count_kept(layers, keep).items():
        num_experts = layers[path].num_experts
        each = _of_group(path, count, num_experts, groups, layers[path].k, exact=not isinstance(keep, float))
        if order == "random":
            ranks = torch.randperm(num_experts, generator=generator).argsort()
        else:
            found = None if load is None else load.get(path)
            if found is None or found.shape != (num_experts,):
                got = "none" if found is None else f"one of shape {tuple(found.shape)}"
                raise UserError(f"keeping experts of {path} by load needs a load of its {num_experts}: got {got}.")
            ranks = found.to(torch.float64).argsort(descending=order != "reversed", stable=True).argsort()
        best = ranks.view(groups, -1).argsort(dim=1)[:, :each]  # in each group
        first = torch.arange(groups)[:, None] * (num_experts // groups)
        kept[path] = (best + first).flatten().sort().values
    return kept


def _of_group(path: str, count: int, num_experts: int, groups: int, k: float, *, exact: bool) -> int:
    """How many experts each group keeps."""
    if num_experts % groups:
        raise UserError(f"{path} must have {groups} equal groups of experts: it has {num_experts} experts.")
    if exact and count % groups:
        near = sorted({max(groups, count // groups * groups), -(-count // groups) * groups})
        raise UserError(
            f"{path} has {groups} groups of experts, which must stay equal: got keep={count}. Keep "
            f"{' or '.join(map(str, near))}."
        )
    least = -(-max(1, int(k)) // groups)
    return min(max(least, int(count / groups + 0.5)), num_experts // groups)


def take_experts(state: State, layers: Mapping[str, SparseLayer], taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model with the chosen experts: their weights, their rows of the gates, tables that name them.

    A table (hash and task routers) that names an expert that is not taken names another afterwards: what fell to the
    experts left out is dealt to the taken ones in turn, in the order of the table. Of an expert that is taken several
    times it names the copies in turn.

    Args:
        state: The tensors by name; others than those of the layers pass through. Optimizer state works alike.
        layers: The result of `sparse_layers` for the model that the state is of.
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
    for name, layer, dim in expert_tensors(layers):
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
