"""The contract of expert banks: `EXPERTS_CHECKS`, and `check_experts` which runs them all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moekit.experts.base import Experts
from moekit.testing import modules
from moekit.testing.cases import skewed_tokens, trace
from moekit.testing.closeness import assert_close, assert_same, rule
from moekit.testing.modules import build

Factory = Callable[[], Experts]


def _some_rows(experts: Experts, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Packed rows and unequal counts; the second expert has none (of one expert there is only the first)."""
    counts = torch.arange(experts.num_experts) % 3 + 2
    if experts.num_experts > 1:
        counts[1] = 0
    return skewed_tokens(int(counts.sum()), experts.dim, dtype=dtype), counts


def _loop(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """Every expert on its rows, by its plain twin."""
    blocks = rows.split(counts.tolist())
    return torch.cat([experts.reference(e, block) for e, block in enumerate(blocks)])


def _packed(experts: Experts) -> dict[str, Tensor]:
    """All that a bank computes in evaluation on packed rows, gradients included."""
    rows, counts = _some_rows(experts, next(experts.parameters()).dtype)
    was = experts.training
    found = trace(lambda x: experts(x, counts), experts.eval(), rows)
    experts.train(was)
    return found


def check_axes(factory: Factory) -> None:
    """`axes` names the logical axes of every parameter, the expert axis among them, so that it can be sharded."""
    experts = build(factory)
    name = type(experts).__name__
    for key, parameter in experts.named_parameters():
        rule(key in experts.axes, f"{name}.axes does not name the parameter {key}: add its logical axes.")
        axes = experts.axes[key]
        rule(
            len(axes) == parameter.ndim,
            f"{name}.axes[{key!r}] has {len(axes)} names {axes} for a parameter of shape {tuple(parameter.shape)}.",
        )
        if "expert" in axes:
            size = parameter.shape[axes.index("expert")]
            rule(
                size == experts.num_experts,
                f"{name}.{key} has {size} entries along its expert axis, the bank has {experts.num_experts} experts.",
            )


def check_packed_equals_reference(factory: Factory) -> None:
    """Packed rows: outputs and all gradients equal the plain twin, with an expert that has no row."""
    for dtype in (torch.float64, torch.float32):
        experts = build(factory, dtype=dtype, training=False)
        rows, counts = _some_rows(experts, dtype)
        fast = trace(partial(experts, counts=counts), experts, rows)
        slow = trace(partial(_loop, experts, counts=counts), experts, rows)
        assert_same(fast, slow, f"packed forward differs from reference() in {dtype}")


def check_padded_equals_reference(factory: Factory) -> None:
    """Padded rows ``[E, C, D]``: outputs and all gradients equal the plain twin."""
    for dtype in (torch.float64, torch.float32):
        experts = build(factory, dtype=dtype, training=False)
        e, slots, dim = experts.num_experts, 3, experts.dim
        rows = skewed_tokens(e * slots, dim, dtype=dtype)
        counts = torch.full((e,), slots)

        def padded(x: Tensor, b: Experts = experts, shape: tuple[int, ...] = (e, slots, dim)) -> Tensor:
            out = b(x.view(shape))
            rule(out.shape == shape, f"padded forward returns shape {tuple(out.shape)} for rows of {shape}.")
            return out.reshape(-1, shape[-1])

        fast = trace(padded, experts, rows)
        slow = trace(partial(_loop, experts, counts=counts), experts, rows)
        assert_same(fast, slow, f"padded forward differs from reference() in {dtype}")


def check_no_rows(factory: Factory) -> None:
    """No row at all, and one row for the last expert: right shapes, and gradients of exactly zero elsewhere."""
    experts = build(factory, training=False)
    e, dim = experts.num_experts, experts.dim
    nothing = trace(lambda x: experts(x, torch.zeros(e, dtype=torch.int64)), experts, torch.zeros(0, dim))
    rule(nothing["output"].shape == (0, dim), "packed forward of no rows must return Float[0, D].")
    padded = trace(lambda x: experts(x.view(e, 0, dim)), experts, torch.zeros(0, dim))
    rule(padded["output"].shape == (e, 0, dim), "padded forward of no slots must return Float[E, 0, D].")
    for found, where in ((nothing, "packed"), (padded, "padded")):
        for name in (n for n in found if n.startswith("gradient")):
            rule(not found[name].any(), f"without a row ({where}) the {name} is not exactly zero.")
    counts = torch.zeros(e, dtype=torch.int64)
    counts[-1] = 1
    single = trace(lambda x: experts(x, counts), experts, skewed_tokens(1, dim))
    for key, axes in experts.axes.items():
        name = f"gradient of {key}"
        if name in single and "expert" in axes and e > 1:
            others = single[name].movedim(axes.index("expert"), 0)[:-1]
            rule(not others.any(), f"an expert without a row has a non-zero {name}.")


def check_row_independence(factory: Factory) -> None:
    """In evaluation a row's result depends on that row alone, and a second run gives the same."""
    experts = build(factory, training=False)
    rows, counts = _some_rows(experts)
    changed = rows.clone()
    changed[0] += 1.0
    with torch.no_grad():
        before, again, after = experts(rows, counts), experts(rows, counts), experts(changed, counts)
    rule(torch.equal(before, again), "two forwards in evaluation differ: nothing may be random there.")
    assert_close(after[1:], before[1:], "changing one row changes the results of others")


def check_low_precision(factory: Factory) -> None:
    """bf16 parameters give bf16 results; autocast to bf16 works; both are near float32."""
    experts = build(factory, training=False)
    with torch.no_grad():
        for tensor in experts.parameters():
            tensor.copy_(tensor.bfloat16())
    rows, counts = _some_rows(experts)
    rows = rows.bfloat16()
    wide = experts(rows.float(), counts)
    half = copy.deepcopy(experts).bfloat16()
    out = half(rows, counts)
    rule(out.dtype == torch.bfloat16, f"a bf16 bank must return bf16 on bf16 rows, not {out.dtype}.")
    assert_close(out, wide.bfloat16(), "a bf16 bank is far from the same bank in float32")
    out.sum().backward()
    for key, parameter in half.named_parameters():
        rule(parameter.grad is not None, f"the bf16 parameter {key} gets no gradient.")
    with torch.autocast("cpu", torch.bfloat16):
        cast = experts(rows.float(), counts)
    assert_close(cast.bfloat16(), wide.bfloat16(), "under autocast to bf16 a bank is far from float32")


def check_checkpointing(factory: Factory) -> None:
    """Activation checkpointing (recomputing forward in the backward) changes nothing, dropout included."""
    experts = build(factory, training=True)
    rows, counts = _some_rows(experts)
    modules.check_checkpointing(experts, rows, counts=counts)


def check_compiles(factory: Factory) -> None:
    """The padded path compiles to one graph with the results of eager, and is not compiled again for other values."""
    experts = build(factory, training=False)
    e, dim = experts.num_experts, experts.dim
    modules.check_compiles(experts, [skewed_tokens(3 * e, dim, seed=seed).view(e, 3, dim) for seed in (0, 1)])


EXPERTS_CHECKS: tuple[Callable[[Factory], None], ...] = (
    check_axes,
    check_packed_equals_reference,
    check_padded_equals_reference,
    check_no_rows,
    check_row_independence,
    check_low_precision,
    check_checkpointing,
    check_compiles,
    *modules.checks_of_any_module(_packed),
)
