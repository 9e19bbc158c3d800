"""Which experts to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.surgery.anatomy import SparseLayer

Order = Literal["utilisation", "reversed", "random"]


def count_kept(layers: Mapping[str, SparseLayer], keep: int | float) -> dict[str, int]:
    """How many experts stay in each layer.

    Args:
        layers: from `sparse_layers`.
        keep: an int = that many in every layer; a float in (0, 1] = that share of each layer's, rounded to the nearest
            (halves up), and never fewer than a token chooses.

    Raises:
        UserError: if a layer has not so many, a token chooses more, the number or share is not positive, or the share
            is over 1.
    """
    if keep <= 0 or (isinstance(keep, float) and keep > 1):
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


def choose_experts(
    layers: Mapping[str, SparseLayer],
    keep: int | float,
    order: Order = "utilisation",
    *,
    load: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Numbers of the experts to keep in each layer, ascending.

    Args:
        layers: from `sparse_layers`.
        keep: see `count_kept`.
        order: "utilisation" keeps those with the highest load (of equal ones the first), "reversed" those with the
            lowest, "random" draws without replacement.
        load: Float[E] for each layer: how much each expert is used, overall or for the language or task that the
            specialist is for. Not needed at random.
        seed: of the draw.

    Returns:
        Int64[m] by layer.

    Raises:
        UserError: see `count_kept`; or there is no load of E entries for a layer.

    Source: arXiv:2109.10465 (a model pruned to some of its experts, at random or by utilisation). Differs: its text
        was not at hand; how ties and shares are resolved is ours.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for path, count in count_kept(layers, keep).items():
        num_experts = layers[path].num_experts
        if order == "random":
            ranked = torch.randperm(num_experts, generator=generator)
        else:
            found = None if load is None else load.get(path)
            if found is None or found.shape != (num_experts,):
                got = "none" if found is None else f"one of shape {tuple(found.shape)}"
                raise UserError(f"keeping experts of {path} by load needs a load of its {num_experts}: got {got}.")
            ranked = found.to(torch.float64).argsort(descending=order == "utilisation", stable=True)
        kept[path] = ranked[:count].sort().values
    return kept
