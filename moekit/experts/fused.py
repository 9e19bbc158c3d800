"""A bank and a routing as one operation, without rows in between, where the bank's backend has one."""

from __future__ import annotations

from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts.base import Experts
from moekit.experts.grouped import GroupedGLU, GroupedMLP
from moekit.functional.eager import is_symbolic
from moekit.functional.precision import autocast_dtype
from moekit.kernels.gpu.backend import Backend, choose
from moekit.kernels.gpu.feed_forward import feed_forward
from moekit.kernels.gpu.hub import sonic_feed_forward
from moekit.kernels.gpu.rows import permute, row_order, unpermute
from moekit.routing import Routing


def weighted_sum(bank: Experts, x: Tensor, routing: Routing) -> Tensor | None:
    """Float[T, D]: for each token the weighted sum of its experts; None where dispatcher, bank and sum are apart.

    Triton computes banks of two-layer and gated experts as a whole. Those with biases, adapters, dropout or hooks and
    other banks compute rows; these are sorted and summed by kernels where nothing was dropped.

    Args:
        bank: all of whose experts are here.
        x: Float[T, D].
        routing: the assignments; only a choice-major list is fused.

    Raises:
        UserError: if the backend was named and cannot compute this.
    """
    backend: Backend = getattr(bank, "backend", "torch")  # what only looks like a bank computes by itself
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):  # asked in every forward
        return None
    if routing.choices is None or is_symbolic():
        return None
    matrices, kind = _whole_matrices(bank), autocast_dtype(x) or x.dtype
    if backend == "sonicmoe":
        if matrices is None or not isinstance(bank, GroupedGLU):
            raise UserError(
                f'backend="sonicmoe" computes GroupedGLU without bias, adapters, dropout and hooks, whose weights are '
                f'not divided: got {type(bank).__name__}({bank.extra_repr()}). Use backend="auto".'
            )
        whole = sonic_feed_forward(
            x.to(kind), routing, bank.w_gate.to(kind), bank.w_up.to(kind), bank.w_out.to(kind), bank.activation
        )
        return whole.to(x.dtype)
    if choose(backend, x, "layer", kind).name != "triton":
        return None
    order = row_order(routing)
    if matrices is None:
        if not routing.all_kept:
            return None
        rows = bank(permute(x, order), order.counts)
        return unpermute(rows, routing.weight, order)
    w_in, second, w_out = (None if matrix is None else matrix.to(kind) for matrix in matrices)
    assert w_in is not None
    assert w_out is not None
    assert isinstance(bank, GroupedMLP | GroupedGLU)
    return feed_forward(x.to(kind), routing.weight, w_in, second, w_out, order, bank.activation, dtype=x.dtype)


def _whole_matrices(bank: Experts) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Input, second and output matrices of a bank that is these and an activation, and nothing else now."""
    if type(bank) not in (GroupedMLP, GroupedGLU) or "adapters" in bank._modules:
        return None
    assert isinstance(bank, GroupedMLP | GroupedGLU)
    hooks = (bank._forward_hooks, bank._forward_pre_hooks, bank._backward_hooks, bank._backward_pre_hooks)
    if (bank.dropout and bank.training) or any(hooks) or "forward" in vars(bank):
        return None
    found: tuple[Tensor, Tensor | None, Tensor]
    if isinstance(bank, GroupedGLU):
        if bank.b_hidden is not None:
            return None
        found = bank.w_gate, bank.w_up, bank.w_out
    else:
        if bank.b_in is not None or bank.b_out is not None:
            return None
        found = bank.w_in, None, bank.w_out
    # Divided weights, and those that a parametrization or a hook makes in forward, are the bank's own affair.
    return found if all(matrix is None or type(matrix) in (Tensor, nn.Parameter) for matrix in found) else None
