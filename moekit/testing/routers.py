"""The contract of routers: `ROUTER_CHECKS`, and `check_router` which runs them all."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from moekit.experts.grouped import GroupedMLP
from moekit.functional.reference import moe_reference
from moekit.layer import MoELayer, MoEOutput
from moekit.routing import DecodingContext, Router, Routing, RoutingContext
from moekit.routing_traces.replay import weighs_choices
from moekit.testing import modules
from moekit.testing.cases import seeded, skewed_tokens, some_context, some_mask, tensors_of, trace
from moekit.testing.closeness import assert_close, assert_same, rule
from moekit.testing.modules import build
from moekit.testing.routing import check_routing

Factory = Callable[[], Router]

T = 48
PHASES = ((True, "in training"), (False, "in evaluation"))


def _dim(router: Router) -> int:
    """D; a router with ``dim = None`` reads no hidden states, and any width will do."""
    dim = getattr(router, "dim", 0)
    name = type(router).__name__
    rule(dim is None or dim, f"{name} must say how wide its input is: set `self.dim`, or None if it reads none.")
    return dim or 8


def _layer(factory: Factory, *, dtype: torch.dtype = torch.float32, training: bool = True) -> MoELayer:
    """The router in a layer with small experts."""
    router = build(factory, dtype=dtype, training=training)
    with seeded(7):
        experts = GroupedMLP(router.num_experts, _dim(router), 5, activation="silu", bias=True, init_scale=1.0)
    return MoELayer(router, experts).to(dtype).train(training)


def _inputs(
    router: Router, num_tokens: int = T, dtype: torch.dtype = torch.float32, *, masked: bool = True
) -> tuple[Tensor, RoutingContext]:
    """Skewed tokens and a full context."""
    mask = some_mask(num_tokens) if masked else None
    return skewed_tokens(num_tokens, _dim(router), dtype=dtype), some_context(router, num_tokens, mask=mask)


def _route(router: Router, x: Tensor, context: RoutingContext | None, seed: int = 1) -> Routing:
    with seeded(seed):
        return router(x, context)


def _summary(router: Router) -> dict[str, Tensor]:
    """All that a router computes in training and evaluation, as tensors by name."""
    found: dict[str, Tensor] = {}
    was = router.training
    for training, phase in PHASES:
        router.train(training)
        x, context = _inputs(router, dtype=next((p.dtype for p in router.parameters()), torch.float32))
        found |= {f"{name} {phase}": value.detach() for name, value in tensors_of(_route(router, x, context)).items()}
    router.train(was)
    return found


def _compare_with_reference(layer: MoELayer, x: Tensor, context: RoutingContext | None, what: str) -> None:
    """Output, losses and every gradient of the layer against the loop over assignments."""

    def slow(x: Tensor) -> MoEOutput:
        routing = layer.router(x, context)
        return MoEOutput(moe_reference(x, routing, layer.experts.reference), routing)

    assert_same(trace(partial(layer, context=context), layer, x), trace(slow, layer, x), what)


def check_invariants(factory: Factory) -> None:
    """The list of assignments is well formed: ranges, types, queues without gaps, capacity, no padding."""
    for training, phase in PHASES:
        router = build(factory, training=training)
        for masked in (False, True):
            x, context = _inputs(router, masked=masked)
            check_routing(_route(router, x, context), context, what=f"{type(router).__name__} {phase}")
    router = build(factory, training=False)
    try:
        bare = _route(router, skewed_tokens(T, _dim(router)), None)
    except ValueError:
        return  # one that needs its context may say so
    check_routing(bare, None, what=f"{type(router).__name__} without context")


def check_equals_reference(factory: Factory) -> None:
    """In a layer: outputs, losses and all gradients equal the loop over assignments, in float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        for training, phase in PHASES:
            layer = _layer(factory, dtype=dtype, training=training)
            x, context = _inputs(layer.router, dtype=dtype)
            _compare_with_reference(layer, x, context, f"the layer differs from the reference {phase}, {dtype}")


def check_edge_batches(factory: Factory) -> None:
    """All tokens to one expert, one token, no token, nothing but padding: right results, finite losses."""
    for training, phase in PHASES:
        layer = _layer(factory, dtype=torch.float64, training=training)
        dim = _dim(layer.router)
        for num_tokens in (0, 1):
            x, context = _inputs(layer.router, num_tokens, torch.float64, masked=False)
            _compare_with_reference(layer, x, context, f"{num_tokens} tokens {phase}")
        context = some_context(layer.router, T)
        same = skewed_tokens(1, dim, dtype=torch.float64).expand(T, dim)
        names = ("token_ids", "previous_ids", "next_ids", "position", "task")
        ids = {name: torch.zeros(T, dtype=torch.int64) for name in names}
        _compare_with_reference(layer, same, dataclasses.replace(context, **ids), f"{T} equal tokens {phase}")
        padding = dataclasses.replace(context, mask=torch.zeros(T, dtype=torch.bool))
        found = trace(partial(layer, context=padding), layer, same)
        for name, value in found.items():
            rule(value.isfinite().all(), f"a batch of nothing but padding gives a {name} that is not finite {phase}.")
        for name in ("output", "gradient of x"):
            rule(not found[name].any(), f"a batch of nothing but padding gives a non-zero {name} {phase}.")


def check_padding_content(factory: Factory) -> None:
    """What padding holds, NaN included, changes no output, loss, statistic or gradient."""
    real = some_mask(T)
    for training, phase in PHASES:
        layer = _layer(factory, training=training)
        x, context = _inputs(layer.router)
        other = some_context(layer.router, T, mask=real, seed=5)
        changed = tree_map(lambda now, new: None if now is None else torch.where(real, now, new), context, other)
        before = trace(partial(layer, context=context), layer, x)
        for name in ("output", "gradient of x"):
            rule(not before[name][~real].any(), f"padding has a non-zero {name} {phase}.")
        for kind, fill in (("large numbers", 1e4), ("NaN", float("nan"))):
            filled = torch.where(real[:, None], x, fill)
            after = trace(partial(layer, context=changed), layer, filled)
            assert_same(
                after,
                before,
                f"with {kind} in the padding results change {phase} (clear padding with masked_fill before any "
                "arithmetic: multiplying by zero keeps NaN)",
            )


def check_more_padding(factory: Factory) -> None:
    """Where evaluation is dropless, rows of padding added at the end change nothing: no denominator counts them."""
    layer = _layer(factory, training=False)
    x, context = _inputs(layer.router, masked=False)
    if _route(layer.router, x, context).capacity is not None:
        return
    extra = 13
    longer = some_context(layer.router, T + extra, mask=torch.arange(T + extra) < T)
    # The first T tokens as before; the padding belongs to the sequences that are there.
    joined = tree_map(lambda now, more: None if now is None else torch.cat([now, more[:extra]]), context, longer)
    joined = dataclasses.replace(joined, mask=longer.mask)
    short = trace(partial(layer, context=context), layer, x)
    padded = trace(partial(layer, context=joined), layer, torch.cat([x, torch.ones(extra, x.shape[1])]))
    padded = {n: v[:T] if n in ("output", "gradient of x") else v for n, v in padded.items()}
    assert_same(padded, short, "adding padding changes results")


def check_order_of_tokens(factory: Factory) -> None:
    """Where evaluation is dropless, tokens in another order give the same results in that order.

    Not for a router that says it deals experts `by_position`.
    """
    layer = _layer(factory, training=False)
    x, context = _inputs(layer.router)
    if layer.router.by_position or _route(layer.router, x, context).capacity is not None:
        return
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    mixed = tree_map_only(Tensor, lambda value: value[order], context)
    with torch.no_grad():
        assert_close(layer(x[order], mixed).hidden, layer(x, context).hidden[order], "tokens in another order")


def check_decoding(factory: Factory) -> None:
    """A step of decoding, which wants no gradients and may leave losses out, is routed as in evaluation."""
    layer = _layer(factory, dtype=torch.float64, training=False)
    for masked in (False, True):
        x, context = _inputs(layer.router, dtype=torch.float64, masked=masked)
        step = DecodingContext(**{f.name: getattr(context, f.name) for f in dataclasses.fields(context)})
        expected = layer(x, context)
        with torch.no_grad():
            found = layer(x, step)
        for name in ("token", "expert", "position", "kept"):
            same = torch.equal(getattr(found.routing, name), getattr(expected.routing, name))
            rule(
                same, f"a step of decoding changes the routing's `{name}`: without gradients it must be the same list."
            )
        assert_close(found.routing.weight, expected.routing.weight, "weights in a step of decoding")
        assert_close(found.hidden, expected.hidden, "the output in a step of decoding")


def check_randomness(factory: Factory) -> None:
    """Evaluation is deterministic and draws nothing; training follows `torch.manual_seed`."""
    router = build(factory, training=False)
    x, context = _inputs(router)
    with seeded(3):
        state = torch.get_rng_state()
        first = tensors_of(router(x, context))
        rule(
            torch.equal(state, torch.get_rng_state()),
            "evaluation draws random numbers: it must be deterministic; switch noise off when not self.training.",
        )
    for name, value in tensors_of(router(x, context)).items():
        rule(torch.equal(value, first[name]), f"evaluation is not deterministic: {name} differs the second time.")
    router.train()
    first = tensors_of(_route(router, x, context, seed=11))
    for name, value in tensors_of(_route(router, x, context, seed=11)).items():
        rule(
            value.shape == first[name].shape and torch.equal(value, first[name]),
            f"training does not follow torch.manual_seed: {name} differs; draw from torch's default generator.",
        )


def check_imposed(factory: Factory) -> None:
    """A router that weighs given choices (`Router.imposed`) weighs its own as `forward` does, to the last digit.

    Also what else it draws and computes is the same, and the gradients. Other choices than its own are kept as they
    are.
    """
    if not weighs_choices(build(factory)):
        return
    for training, phase in PHASES:
        for masked in (True, False):
            router = build(factory, training=training)
            x, context = _inputs(router, masked=masked)
            own = _route(router, x, context)
            choice = tree_map_only(Tensor, Tensor.detach, own)

            def again(x: Tensor) -> Routing:
                with seeded(1):
                    return router.imposed(x, context, dataclasses.replace(choice, weight=torch.zeros(())))  # noqa: B023

            def forward(x: Tensor) -> Routing:
                return _route(router, x, context)  # noqa: B023

            name = type(router).__name__
            expected, got = (_with_gradients(route, router, x) for route in (forward, again))
            for part, value in expected.items():
                same = torch.equal(value, got[part])
                rule(same, f"{name} {phase}: imposing its own choice must give the same `{part}` to the last digit.")
            turned = dataclasses.replace(choice, expert=(choice.expert + 1) % router.num_experts)
            found = router.imposed(x, context, turned)
            for part in ("token", "expert", "position", "kept"):
                same = torch.equal(getattr(found, part), getattr(turned, part))
                rule(same, f"{name} {phase}: imposed must keep the `{part}` of the choice that it is given.")


def _with_gradients(route: Callable[[Tensor], Routing], router: Router, x: Tensor) -> dict[str, Tensor]:
    """All of a routing, and the gradients of a sum of it."""
    x = x.clone().requires_grad_()
    router.zero_grad()
    found = tensors_of(route(x))
    scalars = [value.double().square().sum() for value in found.values() if value.requires_grad]
    if scalars:
        torch.stack(scalars).sum().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in [("x", x), *router.named_parameters()] if p.grad is not None}
    return {**{name: value.detach() for name, value in found.items()}, **gradients}


def check_future(factory: Factory) -> None:
    """Unless `looks_ahead` says so, the experts that a token asks for do not depend on later tokens."""
    for training, phase in PHASES:
        router = build(factory, training=training)
        if router.looks_ahead:
            continue
        x, context = _inputs(router)
        half = T // 2
        changed = torch.where(torch.arange(T)[:, None] < half, x, -x)
        asked = []
        for tokens in (x, changed):
            routing = _route(router, tokens, context)
            early = routing.queued & (routing.token < half)
            asked.append(sorted(zip(routing.token[early].tolist(), routing.expert[early].tolist(), strict=True)))
        rule(
            asked[0] == asked[1],
            f"{type(router).__name__}.looks_ahead is False, yet {phase} later tokens change what earlier ones ask for: "
            "set looks_ahead = True.",
        )


def check_low_precision(factory: Factory) -> None:
    """Router arithmetic is float32: in a bf16 module, and under autocast, as in float32 on the same values.

    The bf16 module runs with bf16 as torch's default type, as under Lightning's precision "bf16-true".
    """
    for training, phase in PHASES:
        router = build(factory, training=training)
        with torch.no_grad():
            for tensor in router.parameters():
                tensor.copy_(tensor.bfloat16())
        x, context = _inputs(router)
        x = x.bfloat16().float()
        expected = tensors_of(_route(router, x, context))
        half = copy.deepcopy(router).bfloat16()
        with HalfPrecision("bf16-true").forward_context():
            found = tensors_of(_route(half, x.bfloat16(), context))
        hint = (
            "the router computes in low precision: widen x and weights to float32, with autocast off, and say "
            "dtype=torch.float32 where you make tensors or draw random numbers"
        )
        assert_same(found, expected, f"bf16 module {phase}: {hint}")
        rule(
            found["weight"].dtype == torch.float32, f"bf16 module {phase}: weights are {found['weight'].dtype}; {hint}."
        )
        with torch.autocast("cpu", torch.bfloat16):
            cast = tensors_of(_route(router, x, context))
        assert_same(cast, expected, f"autocast {phase}: {hint}")


def check_checkpointing(factory: Factory) -> None:
    """Activation checkpointing (recomputing forward in the backward) changes nothing, randomness included."""
    layer = _layer(factory, training=True)
    x, context = _inputs(layer.router)
    modules.check_checkpointing(layer, x, context=context)


def check_compiles(factory: Factory) -> None:
    """With a capacity the layer compiles to one graph, with the results of eager, once for all values."""
    layer = _layer(factory)
    x, context = _inputs(layer.router)
    for training, _ in PHASES:
        layer.train(training)
        if _route(layer.router, x, context).capacity is not None:
            others = [skewed_tokens(T, _dim(layer.router), seed=seed) for seed in (0, 1)]
            modules.check_compiles(layer, others, context=context)
            return


ROUTER_CHECKS: tuple[Callable[[Factory], None], ...] = (
    check_invariants,
    check_equals_reference,
    check_edge_batches,
    check_padding_content,
    check_more_padding,
    check_order_of_tokens,
    check_decoding,
    check_randomness,
    check_imposed,
    check_future,
    check_low_precision,
    check_checkpointing,
    check_compiles,
    *modules.checks_of_any_module(_summary),
)
