"""Grouped matrix product: rows sorted by expert, each block times its expert's own matrix.

Why not ``for e: x_e @ w[e]``: the backward of ``w[e]`` allocates and adds a full zero ``[E, D, F]`` for every expert,
which at 32 experts made a training step eleven times slower than a dense one. Here every expert's gradient is
written once, into its place. Why not `torch.nn.functional.grouped_mm` on a CPU: it refuses float64 and expanded
gradients. On a GPU it is used where it is one kernel, which is bf16 on Hopper and Blackwell: elsewhere it reads the
offsets back in each product, forward and backward, and loops too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.functional.eager import is_eager, is_transformed
from moekit.functional.precision import autocast_dtype
from moekit.kernels.gpu import products
from moekit.kernels.gpu.backend import Backend, choose, is_one_kernel
from moekit.kernels.host_counts import on_host

_ALIGNED = 8  # bf16 numbers in 16 bytes: what the rows of a matrix must be a multiple of in torch's kernel
_FEW = 256  # rows that are computed without a count on the host, if no gradient is wanted,
_FEW_NUMBERS = 1 << 26  # and as many numbers may be written for it


def grouped_mm_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The obvious form of `grouped_mm`, by autograd."""
    blocks = x.split(counts.tolist())
    return torch.cat([block @ w for block, w in zip(blocks, weight.unbind(0), strict=True)])


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, backend: Backend = "auto") -> Tensor:
    """Multiply the e-th block of rows by the e-th matrix.

    Args:
        x: Float[R, D], rows sorted by expert.
        weight: Float[E, D, F].
        counts: Int64[E], rows of each expert; they sum to R. Experts may have none.
        backend: who multiplies; see `moekit.use_backend`.

    Returns:
        Float[R, F], in the autocast type where autocast is on, else in the type of `x`. What `torch.func` transforms
        (vmap, grad, jvp, ...) is computed by every expert for every row, so that no shape depends on data.

    Raises:
        ValueError: if `counts` does not sum to R or has not one entry per matrix, where they are read: on a CPU, and
            on a GPU without a kernel for the type.
        UserError: if `backend` is "triton" and it cannot compute these.
    """
    kind = x.device.type
    if (dtype := autocast_dtype(x)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    if is_transformed():
        return _by_all_experts(x, weight, counts)
    few = kind == "cuda" and _are_few(x, weight)
    wanted = x.dtype == weight.dtype and (backend == "triton" or not few)
    if wanted and choose(backend, x, "product").name == "triton":
        return products.grouped_mm(x, weight, counts)
    if is_one_kernel(x.device, x.dtype):
        return _one_kernel(x, weight, counts)
    if few:
        return _few_rows(x, weight, counts)
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and kind == "cpu"
    if plain and not torch.is_grad_enabled() and is_eager():
        return _multiply(x, weight, counts)  # what autograd and compilers must be told takes longer than few rows
    return _grouped_mm(x, weight, on_host(counts))


def _by_all_experts(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """By operations that everything transforms: each expert multiplies its own rows, and zeros for the others'."""
    number, end = torch.arange(x.shape[0], device=x.device)[:, None], counts.cumsum(0)
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for e, matrix in enumerate(weight.unbind(0)):
        own = (number < end[e]) & (number >= end[e] - counts[e])
        out = out + torch.where(own, x, 0.0) @ matrix
    return out


def _one_kernel(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """By `torch.nn.functional.grouped_mm`, with zeros behind sizes that its kernel does not take."""
    inner, outer = -x.shape[1] % _ALIGNED, -weight.shape[2] % _ALIGNED
    if inner or outer:
        x, weight = F.pad(x, (0, inner)), F.pad(weight, (0, outer, 0, inner))
    weight = weight if _fits(weight) else weight.clone(memory_format=torch.contiguous_format)
    out: Tensor = _GroupedKernel.apply(x, weight, counts)
    return out[:, : out.shape[1] - outer] if outer else out


class _GroupedKernel(torch.autograd.Function):
    """The kernel, and gradients that its own backward does not give.

    Its backward takes no expanded gradient, and the Blackwell kernel leaves what memory held in the weight's gradient
    of an expert without rows (pytorch issue 172439).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        ctx.save_for_backward(x, weight, counts, ends)
        return F.grouped_mm(_whole(x), weight, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, counts, ends = ctx.saved_tensors
        grad = _whole(grads[0])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = F.grouped_mm(grad, weight.transpose(1, 2), offs=ends)
        if ctx.needs_input_grad[1]:
            left, right = (grad, _whole(x)) if _is_turned(weight) else (_whole(x), grad)
            dw = F.grouped_mm(left.t(), right, offs=ends).masked_fill((counts == 0)[:, None, None], 0.0)
            dw = dw.transpose(1, 2) if _is_turned(weight) else dw
        return dx, dw, None


def _whole(rows: Tensor) -> Tensor:
    """Contiguous, and at an address that the kernel takes."""
    rows = rows.contiguous()
    return rows.clone() if rows.storage_offset() % _ALIGNED else rows


def _fits(weight: Tensor) -> bool:
    """Whether the kernel takes the matrices as they lie: rows or columns in one piece, beginning at aligned places."""
    _, down, right = weight.stride()
    lies = (right == 1 and down % _ALIGNED == 0) or (down == 1 and right % _ALIGNED == 0)
    return lies and weight.storage_offset() % _ALIGNED == 0


def _is_turned(weight: Tensor) -> bool:
    """Whether the matrices lie column by column, as the transposed view of a parameter does.

    Their gradient is then made as it will lie in the parameter's own: autograd would copy it otherwise.
    """
    _, down, right = weight.stride()
    return down == 1 and right != 1


def _are_few(x: Tensor, weight: Tensor) -> bool:
    """Whether `_few_rows` may compute them: a step of decoding, where waiting costs more than the products."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    rows, (experts, inner, outer) = x.shape[0], weight.shape
    written = rows * outer * (inner if rows <= experts else experts)
    return rows <= _FEW and written <= _FEW_NUMBERS


def _few_rows(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Without a count on the host: each row by a copy of its matrix, or, of more rows than matrices, by all of them."""
    rows, experts = x.shape[0], weight.shape[0]
    expert = torch.arange(experts, device=x.device).repeat_interleave(counts, output_size=rows)
    if rows <= experts:
        return torch.bmm(x[:, None], weight[expert])[:, 0]
    return torch.matmul(x, weight)[expert, torch.arange(rows, device=x.device)]


@cache
def _multiplies_in_float32(dtype: torch.dtype) -> bool:
    """Whether half-precision products on this CPU are better done in float32.

    Without AVX512-BF16 or AMX a bf16 product ran 8 to 210 times slower than the float32 one.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _edges(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type in which this machine multiplies them."""
    if tensors[0].device.type == "cpu" and _multiplies_in_float32(tensors[0].dtype):
        return tuple(t.float() for t in tensors)
    return tensors


def _zero_unused(stacked: Tensor, counts: Sequence[int]) -> None:
    """Zero the parts of ``stacked`` [E, ...] that belong to experts without rows, neighbours at once."""
    used = (e for e, n in enumerate(counts) if n)
    for before, after in pairwise([-1, *used, len(counts)]):
        if after - before > 1:
            stacked[before + 1 : after].zero_()


def _checked(counts: Tensor, num_rows: int, num_experts: int) -> list[int]:
    """The counts as numbers, if they fit: rows that no expert computes would hold whatever memory held."""
    numbers: list[int] = counts.tolist()
    if len(numbers) != num_experts or sum(numbers) != num_rows or min(numbers, default=0) < 0:
        raise ValueError(
            f"grouped_mm needs one count per matrix, none negative, that sum to the number of rows: got {numbers} for "
            f"{num_experts} matrices and {num_rows} rows. Pass the counts of the dispatcher that made the rows."
        )
    return numbers


def _multiply(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    a, w = _edges(x, weight)
    out = a.new_empty(a.shape[0], w.shape[2])
    used, sizes = _used(_checked(counts, a.shape[0], w.shape[0]))
    # Of the ways to name a part these take least; there are as many products as experts have rows.
    for block, e, into in zip(a.split_with_sizes(sizes), used, out.split_with_sizes(sizes), strict=True):
        torch.mm(block, w.select(0, e), out=into)
    return out.to(x.dtype)


def _used(numbers: Sequence[int]) -> tuple[list[int], list[int]]:
    """The experts that have rows, and how many."""
    used = [e for e, n in enumerate(numbers) if n]
    return used, [numbers[e] for e in used]


@torch.library.custom_op("moekit::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _multiply(x, weight, counts)


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("moekit::grouped_outer", mutates_args=())
def _grouped_outer(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """The e-th block of x, transposed, times the e-th block of y: Float[E, D, F]."""
    a, b = _edges(x, y)
    out = a.new_empty(counts.numel(), a.shape[1], b.shape[1])
    numbers = counts.tolist()  # checked in the forward
    _zero_unused(out, numbers)
    used, sizes = _used(numbers)
    for left, right, e in zip(a.split_with_sizes(sizes), b.split_with_sizes(sizes), used, strict=True):
        torch.mm(left.t(), right, out=out.select(0, e))
    return out.to(x.dtype)


@_grouped_outer.register_fake
def _(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[1], y.shape[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    dx = _grouped_mm(grad, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    dw = None
    if ctx.needs_input_grad[1]:
        turned = _is_turned(weight)
        dw = _grouped_outer(grad, x, counts).transpose(1, 2) if turned else _grouped_outer(x, grad, counts)
    return dx, dw, None


_grouped_mm.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """For gradients of gradients of the matrices."""
    x, y, counts = ctx.saved_tensors
    dx = _grouped_mm(y, grad.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    dy = _grouped_mm(x, grad, counts) if ctx.needs_input_grad[1] else None
    return dx, dy, None


_grouped_outer.register_autograd(
    _outer_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
