"""The contract of dispatchers: `DISPATCHER_CHECKS`, and `check_dispatcher` which runs them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moekit.dispatch import Dispatcher
from moekit.experts.grouped import GroupedMLP
from moekit.functional.reference import moe_reference
from moekit.routing import Routing
from moekit.testing.cases import random_routing, seeded, skewed_tokens, trace
from moekit.testing.closeness import assert_close, assert_same, rule

Factory = Callable[[], Dispatcher]

T, E, D = 19, 4, 6
ROOMY = T  # a capacity with which nothing can be dropped


def _through(dispatcher: Dispatcher, x: Tensor, routing: Routing, experts: GroupedMLP | None = None) -> Tensor:
    """Dispatch and combine; None = experts that change nothing."""
    sent = dispatcher.dispatch(x, routing)
    rows = sent.rows if experts is None else experts(sent.rows, sent.counts)
    return dispatcher.combine(rows, routing, sent.handle)


def _experts(dtype: torch.dtype) -> GroupedMLP:
    with seeded(0):
        return GroupedMLP(E, D, 5, activation="silu", bias=True).to(dtype)


def _compare(dispatcher: Dispatcher, routing: Routing, x: Tensor, what: str) -> None:
    """Output and every gradient (x, weights, experts) against the reference."""
    experts, weight = _experts(x.dtype), nn.Parameter(routing.weight.clone())
    current = dataclasses.replace(routing, weight=weight)
    held = nn.ModuleDict({"experts": experts})
    held.register_parameter("weight", weight)
    fast = trace(partial(_through, dispatcher, routing=current, experts=experts), held, x)
    slow = trace(partial(moe_reference, routing=current, expert=experts.reference), held, x)
    assert_same(fast, slow, what)


def check_equals_reference(factory: Factory) -> None:
    """Outputs and gradients equal the loop over assignments: roomy and tight capacity, one and two choices."""
    for dtype in (torch.float64, torch.float32):
        x = skewed_tokens(T, D, dtype=dtype)
        for k in (1, 2):
            for capacity in (ROOMY, 3, 1):
                routing = random_routing(T, E, k, capacity=capacity, dtype=dtype)
                _compare(factory(), routing, x, f"k={k}, capacity={capacity}, {dtype}")


def check_any_list(factory: Factory) -> None:
    """The list may come in any order, with any number of assignments a token (expert choice), and empty experts."""
    whole = random_routing(T, E, 3, capacity=ROOMY, dtype=torch.float64)
    order = torch.randperm(whole.token.numel(), generator=torch.Generator().manual_seed(3))
    names = ("token", "expert", "weight", "position", "kept")
    routing = dataclasses.replace(whole, **{name: getattr(whole, name)[order] for name in names})
    x = skewed_tokens(T, D, dtype=torch.float64)
    _compare(factory(), routing, x, "a list in another order")
    # Expert 2 is asked by nobody, expert 0 by the first five tokens, some tokens by none.
    token = torch.tensor([0, 1, 2, 3, 4, 4, 9, 9])
    expert = torch.tensor([0, 0, 0, 0, 0, 1, 1, 3])
    position = torch.tensor([4, 3, 2, 1, 0, 0, 1, 0])
    weight = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    kept = torch.ones(8, dtype=torch.bool)
    uneven = Routing(token, expert, weight, position, kept, num_tokens=T, num_experts=E, capacity=5)
    _compare(factory(), uneven, x, "unequal numbers of assignments")


def check_dropless(factory: Factory) -> None:
    """A routing without a capacity either works like one with room for all, or is refused by a ValueError."""
    x = skewed_tokens(T, D, dtype=torch.float64)
    routing = random_routing(T, E, 2, dtype=torch.float64)
    try:
        factory().dispatch(x, routing)
    except ValueError:
        return
    _compare(factory(), routing, x, "a dropless routing")


def check_rows(factory: Factory) -> None:
    """Rows are grouped by expert: packed ``[R, D]`` with counts, or padded ``[E, C, D]`` with zeros between."""
    for capacity in (3, 12):  # all slots taken, and some free
        _check_rows(factory(), capacity)


def _check_rows(dispatcher: Dispatcher, capacity: int) -> None:
    routing = random_routing(T, E, 2, capacity=capacity)
    x = skewed_tokens(T, D)
    sent = dispatcher.dispatch(x, routing)
    kept = torch.zeros(E, dtype=torch.int64).index_add_(0, routing.expert, routing.kept.long())
    if sent.counts is None:
        shape = (E, capacity, D)
        rule(sent.rows.shape == shape, f"padded rows have shape {tuple(sent.rows.shape)} where {shape} is expected.")
        free = torch.arange(capacity) >= kept[:, None]
        rule(not sent.rows[free].any(), "a slot without a token must hold zeros.")
        blocks = [sent.rows[e, : int(kept[e])] for e in range(E)]
    else:
        rule(sent.counts.dtype == torch.int64, f"counts must be Int64[E]: got {sent.counts.dtype}.")
        rule(torch.equal(sent.counts, kept), f"counts are {sent.counts.tolist()}, kept by expert {kept.tolist()}.")
        rule(sent.rows.shape == (int(kept.sum()), D), f"packed rows have shape {tuple(sent.rows.shape)}.")
        blocks = list(sent.rows.split(kept.tolist()))
    for e, block in enumerate(blocks):
        mine = x[routing.token[routing.kept & (routing.expert == e)]]
        rule(
            sorted(map(tuple, block.tolist())) == sorted(map(tuple, mine.tolist())),
            f"the rows of expert {e} are not the tokens that the routing keeps for it.",
        )


def check_identity(factory: Factory) -> None:
    """Experts that change nothing and weights that sum to 1 give x back; a dropped token gets exactly zero."""
    x = skewed_tokens(T, D)
    assert_close(_through(factory(), x, random_routing(T, E, 2, capacity=ROOMY)), x, "identity experts")
    tight = random_routing(T, E, 1, capacity=2)
    out = _through(factory(), x, tight)
    dropped = ~tight.kept
    rule(bool(dropped.any()), "internal: this check needs a dropped token.")
    rule(not out[dropped].any(), "a token of which nothing was kept must get zeros.")
    assert_close(out[~dropped], x[~dropped], "identity experts, kept tokens")


def check_masked_content(factory: Factory) -> None:
    """What is in a row that nobody keeps, and its weight, does not matter, be it NaN."""
    routing = random_routing(T, E, 1, capacity=2)
    lost = ~routing.kept
    experts = _experts(torch.float32)
    run = partial(_through, factory(), experts=experts)
    x = skewed_tokens(T, D)
    clean = trace(partial(run, routing=routing), experts, x)
    rows = trace(partial(run, routing=routing), experts, x.masked_fill(lost[:, None], float("nan")))
    assert_same(rows, clean, "NaN in rows that are not kept leaks")
    spoilt = dataclasses.replace(routing, weight=routing.weight.masked_fill(lost, float("nan")))
    assert_same(trace(partial(run, routing=spoilt), experts, x), clean, "NaN in weights not kept leaks")


def check_edge_sizes(factory: Factory) -> None:
    """No token, one token, one expert for all, nothing kept at all."""
    for tokens in (0, 1):
        for k in (1, 2):
            routing = random_routing(tokens, E, k, capacity=2, dtype=torch.float64)
            _compare(factory(), routing, skewed_tokens(tokens, D, dtype=torch.float64), f"{tokens} tokens, k={k}")
    x = skewed_tokens(T, D, dtype=torch.float64)
    one = random_routing(T, E, 1, capacity=T, dtype=torch.float64)
    one = dataclasses.replace(one, expert=torch.full((T,), 2), position=torch.arange(T), kept=torch.arange(T) < T)
    _compare(factory(), one, x, "all tokens to one expert")
    nothing = dataclasses.replace(one, position=torch.full((T,), -1), kept=torch.zeros(T, dtype=torch.bool))
    _compare(factory(), nothing, x, "nothing kept")


def check_combine_is_wide(factory: Factory) -> None:
    """The weighted sum is made in float32 also where rows are bf16, and in float64 where they are float64."""
    x = skewed_tokens(T, D).bfloat16()
    routing = random_routing(T, E, 3, capacity=ROOMY)
    out = _through(factory(), x, routing)
    rule(out.dtype == torch.float32, f"combine of bf16 rows must return float32, not {out.dtype}.")
    expected = _through(factory(), x.float(), routing)
    assert_close(out, expected, "combine of bf16 rows rounds on the way: multiply and add in float32")
    wide = _through(factory(), x.double(), random_routing(T, E, 3, capacity=ROOMY, dtype=torch.float64))
    rule(wide.dtype == torch.float64, f"combine of float64 rows must return float64, not {wide.dtype}.")


DISPATCHER_CHECKS: tuple[Callable[[Factory], None], ...] = (
    check_equals_reference,
    check_any_list,
    check_dropless,
    check_rows,
    check_identity,
    check_masked_content,
    check_edge_sizes,
    check_combine_is_wide,
)
