"""Tiles of grouped products: their shape, which expert's rows one holds, and the product of a tile.

Rows are sorted by expert. A program computes a tile of rows of one expert; which expert that is, it finds in the
counts, so that no number is read on the host. Every address is computed in int64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.kernels.gpu.language import ceil_div, float32_products, jit, power_of_two, tl, widened

_GROUP = 8  # tiles of rows that share their matrices' tiles in the cache


class Tiles(NamedTuple):
    """Shape of the tiles of a kernel.

    Attributes:
        rows: number of rows of a tile.
        columns: number of columns of a tile.
        inner: how many numbers of a row and a column a step multiplies.
        warps: number of warps of a program.
        stages: how many steps are loaded ahead.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def tiles_for(x: Tensor, num_rows: int, num_experts: int) -> Tiles:
    """Tiles for rows of that type and number.

    As high as an expert's even share, between 16 and 128: what a tile has more than the expert has rows is computed for
    nothing. Three stages where a multiprocessor has 160 KiB of shared memory or more, two where it has 100 KiB (compute
    capability 8.6, 8.9, 12.0).
    """
    rows = min(128, power_of_two(num_rows // max(num_experts, 1), 16))
    stages = 3 if capability(x.device) in ((8, 0), (9, 0), (10, 0), (10, 3)) else 2
    if x.dtype == torch.float32:
        return Tiles(min(rows, 64), 64, 32, 4, stages)
    return Tiles(rows, 128, 64, 8 if rows == 128 else 4, stages)


def narrow(tiles: Tiles) -> Tiles:
    """Half as wide, where an epilogue holds several tiles: ptxas spilled registers of whole ones."""
    return tiles._replace(columns=min(tiles.columns, 64))


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of an A100 for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@jit
def tile_of(counts, experts, tile, E2: tl.constexpr, ROWS: tl.constexpr):
    """Expert of a tile of rows, its first row, and the row behind the expert's last; nothing behind the last tile."""
    e = tl.arange(0, E2)
    n = tl.load(counts + e, mask=e < experts, other=0).to(tl.int32)
    tiles = (n + (ROWS - 1)) // ROWS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = e < expert
    start = tl.sum(tl.where(before, n, 0), 0)
    first = start + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * ROWS
    end = start + tl.sum(tl.where(e == expert, n, 0), 0)
    return expert, first, end


@jit
def swizzled(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile of rows and tile of columns of a program: neighbours share what they read."""
    width = GROUP * tiles_n
    first = (program // width) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (program % width) % size, (program % width) // size


@jit
def dot(a, b, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """The sum of `acc` and the product of two tiles."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def rows_times_matrix(
    acc, x, rows, w, columns, inner, outer, x_row, w_inner, w_outer,
    BI: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of `acc` and x[rows] w[:, columns]; `w` points at the expert's matrix, `rows` are int64 and all there."""
    i = tl.arange(0, BI)
    left = x + rows[:, None] * x_row + i[None, :]
    right = w + i.to(tl.int64)[:, None] * w_inner + columns.to(tl.int64)[None, :] * w_outer
    for step in range(0, inner, BI):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            there = step + i < inner
            a = tl.load(left, mask=there[None, :], other=0.0)
            b = tl.load(right, mask=there[:, None] & (columns < outer)[None, :], other=0.0)
        acc = dot(a, b, acc, WIDEN, PRECISION)
        left += BI
        right += BI * w_inner
    return acc


def row_tiles(rows: int, experts: int, height: int) -> int:
    """Tiles of rows that there are at most, however rows are spread over experts."""
    return min(rows, ceil_div(rows, height) + experts - 1)


def even(inner: int, outer: int, tiles: Tiles) -> bool:
    """Whether no tile of a matrix reaches beyond it, so that nothing need be masked."""
    return inner % tiles.inner == 0 and outer % tiles.columns == 0


def common(experts: int, b: Tiles) -> dict[str, Any]:
    """Constants that all kernels of products have."""
    return {
        "WIDEN": widened(), "PRECISION": float32_products(), "E2": power_of_two(experts),
        "BM": b.rows, "BN": b.columns, "BI": b.inner, "GROUP": _GROUP,
    }  # fmt: skip


def pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for a kernel that will not follow it."""
    return other if tensor is None else tensor
