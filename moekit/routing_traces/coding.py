"""How a routing becomes arrays of the smallest type that fits, and a routing again, to the last bit.

What follows from the rest is not written: the tokens of a list that is choice-major, places in list order, what a
capacity keeps. Each is compared with what would be read before it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.functional.assignment import queue_positions
from moekit.routing import Deviation, Routing
from moekit.routing_traces.trace import OF_TOKENS, TracedLayer, TracedTokens

Array = NDArray[Any]
Take = Callable[[str, int], Array]
"""Gives the next entries of an array by its name: so many."""

PACKED = ("mask", "queued", "kept")
"""Arrays of bits, eight in a byte."""


def smallest(values: Tensor) -> Array:
    """The values in the smallest type of whole numbers that holds them."""
    array = values.numpy()
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    kinds = (np.uint8, np.uint16, np.uint32, np.int64) if low >= 0 else (np.int8, np.int16, np.int32, np.int64)
    kind = next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
    return array.astype(kind)


def bits(values: Tensor) -> Array:
    """Bool[N] as bytes."""
    return np.packbits(values.numpy())


def encode(layer: TracedLayer) -> tuple[dict[str, Any], dict[str, Array]]:
    """What the index says of a layer's routing, and its arrays by name."""
    routing = layer.routing
    queued = routing.position >= 0
    arrays = {"expert": smallest(routing.expert)}
    if layer.weighed:
        arrays["weight"] = routing.weight.numpy()
    if not torch.equal(routing.token, _tokens(routing.num_tokens, routing.choices)):
        arrays["token"] = smallest(routing.token)
    if torch.equal(routing.position, queue_positions(routing.expert, queued, routing.num_experts)):
        if not bool(queued.all()):
            arrays["queued"] = bits(queued)
    else:
        arrays["position"] = smallest(routing.position)
    if not torch.equal(routing.kept, _kept(routing.position, routing.capacity)):
        arrays["kept"] = bits(routing.kept)
    said = {
        "n": routing.token.numel(),
        "experts": routing.num_experts,
        "capacity": routing.capacity,
        "choices": routing.choices,
        "all_kept": routing.all_kept,
        "has": sorted(arrays),
        "losses": _numbers(routing.losses),
        "statistics": _numbers(routing.statistics),
        "deviations": {n: [float(d.total), float(d.count)] for n, d in routing.deviations.items()},
    }
    return said, arrays


def decode(said: Mapping[str, Any], tokens: TracedTokens, take: Take) -> TracedLayer:
    """The layer again."""
    n, experts, capacity = int(said["n"]), int(said["experts"]), said["capacity"]
    has = set(said["has"])

    def whole(name: str) -> Tensor:
        found = take(name, n)
        if found.dtype.kind not in "iu":
            raise ValueError(f"{name} must be whole numbers")
        return torch.from_numpy(found.astype(np.int64))

    def flags(name: str) -> Tensor:
        return torch.from_numpy(np.unpackbits(take(name, -(-n // 8)), count=n).astype(bool))

    expert = _within("expert", whole("expert"), 0, experts)
    if "position" in has:
        position = whole("position")
    else:
        queued = flags("queued") if "queued" in has else torch.ones(n, dtype=torch.bool)
        position = queue_positions(expert, queued, experts)
    listed = tokens.num_tokens * (said["choices"] or 1)
    if "token" not in has and n != listed:  # before as many are made as somebody says
        raise ValueError(f"it lists {n} assignments, and {listed} follow from its tokens")
    weighed = "weight" in has
    weight = torch.from_numpy(take("weight", n).copy()) if weighed else torch.full((n,), float("nan"))
    routing = Routing(
        token=_within("token", whole("token"), 0, tokens.num_tokens)
        if "token" in has
        else _tokens(tokens.num_tokens, said["choices"]),
        expert=expert,
        weight=weight,
        position=position,
        kept=flags("kept") if "kept" in has else _kept(position, capacity),
        losses=_scalars(said["losses"]),
        statistics=_scalars(said["statistics"]),
        num_tokens=tokens.num_tokens,
        num_experts=experts,
        capacity=capacity,
        deviations={
            name: Deviation(torch.tensor(total), torch.tensor(count))
            for name, (total, count) in said["deviations"].items()
        },
        choices=said["choices"],
        all_kept=bool(said["all_kept"]),
    )
    _within("position", routing.position[routing.kept], 0, n)
    if routing.all_kept and not bool(routing.kept.all()):
        raise ValueError("it says that all assignments are kept")
    return TracedLayer(routing, tokens, weighed)


def _within(name: str, values: Tensor, low: int, high: int) -> Tensor:
    """The values, if they are what a router can have returned: others would fail far from here."""
    if values.numel() and not (low <= int(values.min()) and int(values.max()) < high):
        raise ValueError(f"{name} is not in {low}..{high - 1} everywhere")
    return values


def encode_tokens(tokens: TracedTokens) -> tuple[dict[str, Any], dict[str, Array]]:
    """What the index says of tokens, and their arrays by name."""
    found = {name: getattr(tokens, name) for name in OF_TOKENS}
    arrays = {name: smallest(values) for name, values in found.items() if values is not None}
    if tokens.mask is not None:
        arrays["mask"] = bits(tokens.mask)
    return {"n": tokens.num_tokens, "has": sorted(arrays)}, arrays


def decode_tokens(said: Mapping[str, Any], take: Take) -> TracedTokens:
    """The tokens again."""
    n, has = int(said["n"]), said["has"]
    found = {name: torch.from_numpy(take(name, n).astype(np.int64)) for name in OF_TOKENS if name in has}
    mask = None
    if "mask" in has:
        mask = torch.from_numpy(np.unpackbits(take("mask", -(-n // 8)), count=n).astype(bool))
    return TracedTokens(n, mask, **found)


def _tokens(num_tokens: int, choices: int | None) -> Tensor:
    """The tokens of a list that is choice-major."""
    return torch.arange(num_tokens).repeat(choices or 1)


def _kept(position: Tensor, capacity: int | None) -> Tensor:
    return (position >= 0) if capacity is None else (position >= 0) & (position < capacity)


def _numbers(found: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if not value.ndim}


def _scalars(found: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(float(value), dtype=torch.float32) for name, value in found.items()}
