"""Sinkhorn's algorithm: the transport plan from tokens to experts that is balanced and close to the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.functional.eager import is_symbolic

_LOOK_EVERY = 8  # sweeps between two looks at whether it is done, on a device that the host would have to wait for


def sinkhorn(scores: Tensor, mask: Tensor | None = None, *, iterations: int = 100, tol: float = 1e-4) -> Tensor:
    """Scale exp(scores) by rows and columns until every token sends 1 and every expert receives T / E.

    log P = scores + f_t + g_e, in logarithms and float32 throughout, so that no score over- or underflows. Of all
    plans with these sums P maximises <P, scores> + entropy(P) (optimal transport with entropic regularisation).

    Args:
        scores: Float[T, E].
        mask: Bool[T], real tokens; the others send nothing and their rows are zeros.
        iterations: most sweeps.
        tol: stop once every expert receives its share up to this relative error.

    Returns:
        Float32[T, E] (Float64 for Float64), without gradient. Rows sum to 1 exactly, columns to T / E up to `tol`
        (up to what `iterations` sweeps reach).

    Raises:
        ValueError: if `iterations` is below 1 or `tol` negative.

    Source: arXiv:2202.01169 (S-BASE); arXiv:1306.0895 (the iteration).
    Differs: Megatron-LM iterates on exp(scores) itself, which overflows at a score of 89, and without a bound.

    Example:
        >>> import torch
        >>> sinkhorn(torch.tensor([[2.0, 0.0], [1.0, 0.0]])).sum(0)
        tensor([1.0000, 1.0000])
    """
    if iterations < 1 or tol < 0:
        raise ValueError(
            f"sinkhorn needs at least one iteration and a tolerance of at least 0: got iterations={iterations} and "
            f"tol={tol}."
        )
    t, num_experts = scores.shape
    # Detached: the iteration needs no gradient, and everything below is computed from this.
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    column = torch.zeros(num_experts, dtype=scores.dtype, device=scores.device)
    if t == 0:
        return scores
    real = torch.ones(t, dtype=torch.bool, device=scores.device) if mask is None else mask
    scores = scores.masked_fill(~real[:, None], 0.0)
    share = (real.sum().clamp_min(1) / num_experts).log()
    done = ~real.any()
    look_every = 1 if scores.device.type == "cpu" else _LOOK_EVERY
    for sweep in range(1, iterations + 1):
        # Rows are exact here; how far are the columns?
        rows = (scores + column).log_softmax(-1).masked_fill(~real[:, None], -torch.inf)
        excess = torch.logsumexp(rows, dim=0) - share
        done = done | ((excess.exp() - 1).abs().amax() <= tol)
        # Kept, not skipped: the result is the same whether the loop can stop early or, in a compiled graph, cannot.
        column = torch.where(done, column, column - excess)
        if not is_symbolic() and sweep % look_every == 0 and bool(done):  # host read
            break
    return (scores + column).softmax(-1).masked_fill(~real[:, None], 0.0)
