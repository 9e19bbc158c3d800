"""What generation chose, as the one forward over whole sequences that training makes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from moekit.errors import UserError
from moekit.routing import Routing
from moekit.routing_traces.reading import PROCESSES, RoutingTrace, read_trace
from moekit.routing_traces.trace import TracedBatch, TracedLayer, TracedTokens, joined, requeued
from moekit.routing_traces.writing import TraceWriter


def join_rollout(trace: RoutingTrace, file: str | Path, *, rows: int) -> RoutingTrace:
    """A trace of one forward of the forwards that have written sequences, for `replay` in training.

    Record a cached ``generate`` of `rows` sequences; the forward of training is then over all tokens but the last that
    was written, which no forward has read.

    Args:
        trace: of one generation: the prompt's forward, then one for each token.
        file: where to write.
        rows: number of sequences, which are the same in all forwards.

    Raises:
        UserError: there are no rows, the trace is empty, a forward is not of as many tokens of every row, or the file
            cannot be written.

    Source: arXiv:2510.11370, which gives training the experts of inference.
    """
    if rows < 1:
        raise UserError(f"a rollout must be of one or more rows: got {rows}.")
    batches = list(trace)
    if not batches or any(batch.layers.keys() != batches[0].layers.keys() for batch in batches):
        raise UserError("a rollout must be of one or more forwards of the same layers: record one generation.")
    layers = {}
    for name in trace.layers:
        found = [batch.layers[name] for batch in batches]
        whole = in_one_forward([layer.routing for layer in found], rows)
        layers[name] = TracedLayer(whole, TracedTokens(whole.num_tokens), all(layer.weighed for layer in found))
    notes = {name: text for name, text in trace.notes.items() if name != PROCESSES}  # theirs are joined in this file
    with TraceWriter(file, notes) as writer:
        writer.add(TracedBatch(batches[0].step, batches[0].task, False, layers))
    return read_trace(file)


def in_one_forward(routings: Sequence[Routing], rows: int) -> Routing:
    """The routing of whole sequences, as training computes them, of the forwards that have written them.

    A cached search computes the prompt first, and then a token of every row in each forward. What it chose stands here
    in the order of one forward over all: row by row. What was kept stays kept.

    Args:
        routings: of one layer, in the order of the forwards; each has as many tokens of every row.
        rows: number of sequences, which are the same in all forwards.

    Raises:
        UserError: a forward is not of as many tokens of every row.
    """
    if any(routing.num_tokens % rows for routing in routings):
        raise UserError(
            f"forwards of {rows} rows must have as many tokens of each: got {[r.num_tokens for r in routings]} tokens."
        )
    whole = joined(routings)
    lengths = [routing.num_tokens // rows for routing in routings]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    place = torch.arange(rows)[:, None] * starts[-1]
    moved = torch.cat([(place + torch.arange(a, b)).flatten() for a, b in itertools.pairwise(starts)])
    token = moved[whole.token]
    choice = torch.zeros_like(token)
    if whole.choices is not None:
        choice = torch.arange(whole.choices).repeat_interleave(whole.num_tokens)
    order = torch.argsort(choice * max(whole.num_tokens, 1) + token, stable=True)
    expert, kept, queued = whole.expert[order], whole.kept[order], whole.queued[order]
    position = requeued(expert, queued, kept, torch.arange(token.numel()), whole.num_experts)
    return dataclasses.replace(
        whole, token=token[order], expert=expert, weight=whole.weight[order], kept=kept, position=position
    )
