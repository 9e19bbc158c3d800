"""Which pieces of the vocabulary each expert likes: those that it gets more often than their frequency explains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moekit.parallel.host_memory import to_host
from moekit.routing import Routing
from moekit.training.metrics.wide import WideMetric

MAX_CELLS = 2**24
"""Of the tables of all layers together, 128 MiB: with a larger vocabulary its last pieces, the rarest, are left out."""


class PieceCounts(WideMetric):
    """Counts of (piece, expert) in every MoE layer, and of them the most typical pieces of each expert.

    As for the load, assignments count that asked for an expert, dropped ones included.

    Args:
        layers: number of experts E by layer name.
        vocab_size: V. Of pieces there are so many that V x E cells of all layers stay within `MAX_CELLS`.

    Definitions, for a layer with ``n_pe`` assignments of piece p to expert e, ``n_p`` and ``n_e`` their sums over
    experts and pieces, and N their sum:
        lift: ``n_pe * N / (n_p * n_e)``: how many times as often as its share of all assignments lets expect. Its
            logarithm is the pointwise mutual information of piece and expert.

    Source: pointwise mutual information as in Church and Hanks, Computational Linguistics 16 (1990), 22-29. It favours
        rare pairs, therefore a least number of assignments is required.

    Example:
        >>> typical_pieces(torch.tensor([[9, 1], [9, 1], [0, 20]]), number=1, least=5)
        [[(0, 9, 2.0)], [(2, 20, 1.8181818181818181)]]
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, layers: Mapping[str, int], vocab_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = dict(layers)
        self.num_pieces = min(vocab_size, MAX_CELLS // max(1, sum(self.layers.values())))
        for index, num_experts in enumerate(self.layers.values()):
            zeros = torch.zeros(self.num_pieces, num_experts, dtype=torch.int64)
            self.add_state(f"counts_{index}", zeros, dist_reduce_fx="sum")

    def update(self, routings: Mapping[str, Routing], tokens: Tensor) -> None:
        """Count one batch.

        Args:
            routings: routings by layer name.
            tokens: Int64[T] or Int64[B, S] ids of the pieces that the layers routed; padding is in no assignment.

        Raises:
            ValueError: another number of tokens than was routed.
        """
        ids = tokens.reshape(-1)
        for name, routing in routings.items():
            if ids.numel() != routing.num_tokens:
                raise ValueError(f"tokens must be those of the routing: got {ids.numel()} and {routing.num_tokens}.")
            table = getattr(self, f"counts_{list(self.layers).index(name)}")
            piece = ids[routing.token]
            counted = (routing.queued & (piece < self.num_pieces)).to(torch.int64)
            cell = piece.clamp_max(self.num_pieces - 1) * routing.num_experts + routing.expert
            table.view(-1).index_add_(0, cell, counted)

    def compute(self) -> dict[str, Tensor]:
        """Int64[V, E] counts by layer, in host memory."""
        states = to_host([getattr(self, f"counts_{index}") for index in range(len(self.layers))])
        return dict(zip(self.layers, states, strict=True))


def typical_pieces(
    counts: Tensor, number: int = 8, least: int = 5, first: int = 0
) -> list[list[tuple[int, int, float]]]:
    """The most typical pieces of every expert of a layer.

    Args:
        counts: Int64[V, E], assignments of each piece to each expert.
        number: how many pieces of an expert.
        least: the number of assignments to the expert that a piece must have.
        first: the first id of a piece that is named; those below it are counted only.

    Returns:
        For each expert (piece, assignments to the expert, lift) with a lift above 1, the greatest lift first; of equal
        ones the more frequent piece. See `PieceCounts` for what a lift is.
    """
    table = counts.to(torch.float64)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum().clamp_min(1)
    lift = torch.where(counts >= max(1, least), table / expected.clamp_min(1e-12), torch.zeros_like(table))
    lift[:first] = 0
    found: list[list[tuple[int, int, float]]] = []
    for expert in range(counts.size(1)):
        (rows,) = torch.where(lift[:, expert] > 1)
        pieces = [(int(p), int(counts[p, expert]), float(lift[p, expert])) for p in rows]
        found.append(sorted(pieces, key=lambda row: (-round(row[2], 6), -row[1], row[0]))[:number])
    return found
