"""Fine-grained experts: many small ones in place of few large ones, for the same cost."""

from __future__ import annotations

from typing import NamedTuple


class FineGrained(NamedTuple):
    """Sizes of a layer of fine-grained experts.

    Attributes:
        num_experts: experts to choose from.
        hidden_dim: F of each.
        k: choices per token.
        shared_hidden_dim: F of the one feed-forward that is all shared experts together; 0 = none.
    """

    num_experts: int
    hidden_dim: int
    k: int
    shared_hidden_dim: int


def fine_grained(num_experts: int, hidden_dim: int, k: int, *, split: int, shared: int = 0) -> FineGrained:
    """Split every expert in `split`, choose `split` times as many, and make `shared` of the chosen ones always on.

    The parameters and products per token of the experts stay what they were: k F = (k' + shared) F / split. The router
    becomes larger. S shared experts of hidden size f add up to exactly one feed-forward of hidden size S f, so they
    are given to the layer as one:

        sizes = fine_grained(16, 1024, 2, split=4, shared=1)
        MoELayer(
            routers.deepseek_v3(dim, sizes.num_experts, k=sizes.k),
            experts.GroupedGLU(sizes.num_experts, dim, sizes.hidden_dim, activation="silu"),
            shared=transformer.GLU(dim, sizes.shared_hidden_dim, activation="silu"),
        )

    Args:
        num_experts: N experts of the coarse layer.
        hidden_dim: F of each.
        k: choices per token there.
        split: m, into how many parts an expert is cut.
        shared: K_s, how many of the small experts every token takes; they are taken out of both numbers.

    Returns:
        ``(m N - K_s, F / m, m k - K_s, K_s F / m)``.

    Raises:
        ValueError: if `split` does not divide `hidden_dim`, or `shared` leaves no choice.

    Source: arXiv:2401.06066 section 3.1 (fine-grained experts) and 3.2 (shared experts, eq. 9-11).
    """
    if split < 1 or hidden_dim % split:
        raise ValueError(
            f"split must divide hidden_dim, so that parts are of one size: got split={split} and "
            f"hidden_dim={hidden_dim}. Choose another of the two."
        )
    if not 0 <= shared < k * split:
        raise ValueError(
            f"shared must leave at least one choice of the k * split = {k * split} small experts: got {shared}."
        )
    part = hidden_dim // split
    return FineGrained(num_experts * split - shared, part, k * split - shared, shared * part)
