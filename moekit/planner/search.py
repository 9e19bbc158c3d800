"""The largest model for given devices, and the fewest devices for a given model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from moekit.parallel.layout import Layout, Training
from moekit.planner.census import take_census
from moekit.planner.forecast import GIB, Forecast, forecast_of, plan
from moekit.planner.shape import TransformerShape

Growth = Literal["experts", "layers", "width"]


def largest(
    shape: TransformerShape,
    layout: Layout,
    training: Training,
    memory: float,
    *,
    grow: Growth = "experts",
    limit: int = 1_000_000,
) -> Forecast:
    """The largest model of a family that fits, found by trying sizes.

    Args:
        shape: a member of the family.
        layout: how devices share it.
        training: what a device does in a step.
        memory: bytes of a device that may be used.
        grow: what changes: "experts" (their number, in multiples of the expert-parallel size), "layers" (encoder and
            decoder in the shape's proportion), or "width" (D, with F and the size of a head in proportion to it).
        limit: largest size tried.

    Raises:
        ValueError: if not even the smallest member fits, or all up to the limit do.
    """
    family = _family(shape, layout, grow)

    def fits(size: int) -> bool:
        return plan(family(size), layout, training).fits(memory)

    if not fits(1):
        need = plan(family(1), layout, training).memory.device
        raise ValueError(
            f"the smallest {shape.name} needs {need / GIB:.2f} GiB a device on {layout}: got {memory / GIB:.2f} GiB. "
            "Use more devices, a higher ZeRO stage, offloading, checkpointing or shorter micro-batches."
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > limit:
            raise ValueError(
                f"{grow} do not fill {memory / GIB:.2f} GiB a device: {high} times the smallest size still fits. "
                "Grow something else, or raise the limit."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return plan(family(low), layout, training)


def _family(shape: TransformerShape, layout: Layout, grow: Growth) -> Callable[[int], TransformerShape]:
    """Members by size 1, 2, 3, ..."""
    match grow:
        case "experts":
            if not shape.num_experts:
                raise ValueError(f"{shape.name} has no experts to grow. Give num_experts, or grow layers or width.")
            step = layout.expert_parallel_size * math.ceil(shape.k / layout.expert_parallel_size)
            return lambda size: replace(shape, num_experts=step * size)
        case "layers":
            common = math.gcd(shape.encoder_layers, shape.decoder_layers)
            encoder, decoder = shape.encoder_layers // common, shape.decoder_layers // common
            # Whole groups of sparse_every layers, so that the share of sparse layers stays what it is.
            steps = (shape.sparse_every // math.gcd(n, shape.sparse_every) for n in (encoder, decoder) if n)
            group = math.lcm(*steps) if shape.num_experts else 1
            return lambda size: replace(
                shape, encoder_layers=encoder * group * size, decoder_layers=decoder * group * size
            )
        case "width":
            head_dim = shape.head_dim or shape.dim // shape.heads
            per_channel = shape.dim / head_dim
            hidden, expert = shape.hidden_dim / shape.dim, (shape.expert_hidden_dim or 0) / shape.dim
            step = layout.tensor_parallel_size

            def wide(size: int) -> TransformerShape:
                dim = step * round(per_channel * size)
                return replace(
                    shape,
                    dim=dim,
                    head_dim=step * size,
                    hidden_dim=step * round(dim * hidden / step),
                    expert_hidden_dim=step * round(dim * expert / step) or None,
                    beside=step * round(dim * shape.beside / shape.dim / step),
                )

            return wide
        case _:
            raise ValueError(f'grow must be "experts", "layers" or "width": got {grow!r}.')


def fewest_devices(
    model: TransformerShape | nn.Module,
    training: Training,
    memory: float,
    *,
    like: Layout | None = None,
    node: int = 1,
    limit: int = 65_536,
) -> Forecast:
    """The smallest number of devices on which a model fits, with the expert-parallel size that sends least.

    Args:
        model: what `plan` takes.
        training: what a device does in a step.
        memory: bytes of a device that may be used.
        like: tensor-parallel size, replicas, ZeRO stage and offloading of the layouts tried; its number of devices
            and expert-parallel size do not matter. None = ZeRO 3, nothing offloaded.
        node: devices of a node; numbers above it are multiples of it.
        limit: largest number tried.

    Raises:
        ValueError: if it fits on no number up to the limit: what every device must hold is too large.
    """
    like = like or Layout()
    census = take_census(model, training)
    experts = census.fewest_experts or 1
    last: Forecast | None = None
    trouble: ValueError | None = None
    sizes = [n for n in range(1, experts + 1) if experts % n == 0]
    for devices in _numbers(like.tensor_parallel_size * like.replicas, sizes, node, limit):
        fitting: list[Forecast] = []
        for size in sizes:
            if devices % (size * like.replicas * like.tensor_parallel_size):
                continue
            layout = replace(like, devices=devices, expert_parallel_size=size)
            try:
                last = forecast_of(census, layout, training)
            except ValueError as error:
                trouble = trouble or error
                continue  # something cannot be divided so
            if last.fits(memory):
                fitting.append(last)
        if fitting:
            return min(fitting, key=lambda made: made.traffic.total)
    if last is None:
        raise trouble or ValueError(f"limit must be at least {like.tensor_parallel_size * like.replicas}: got {limit}.")
    raise ValueError(
        f"{census.name} fits on no number of devices up to {limit} with {memory / GIB:.2f} GiB each: on "
        f"{last.layout.devices} a device still needs {last.memory.device / GIB:.2f} GiB, of which activations "
        f"{last.memory.activations / GIB:.2f}. Use a higher ZeRO stage, more tensor parallelism, checkpointing, "
        "shorter micro-batches or offloading."
    )


def _numbers(step: int, sizes: Sequence[int], node: int, limit: int) -> list[int]:
    """Numbers that `step` times one of `sizes` divides, of whole nodes above one node, rising.

    Of the multiples of each all up to the sixteenth, then ever sparser.
    """
    found: set[int] = set()
    for size in sizes:
        found |= {*range(step * size, min(node, limit) + 1, step * size)}
        whole = math.lcm(step * size, node)
        devices = whole
        while devices <= limit:
            found.add(devices)
            # A sixteenth more at a time is close enough, and fast.
            devices += whole * max(1, devices // (16 * whole))
    return sorted(found)
