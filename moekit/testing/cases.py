"""What the contract checks are fed with, and how they run a layer and write down all that comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils import _pytree

from moekit.layer import MoEOutput
from moekit.routing import Routing, RoutingContext

NUM_SEQUENCES = 4


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside; the generator of the caller is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def skewed_tokens(num_tokens: int, dim: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Float[T, D] of which more than half lie close together, so that some expert overflows and others starve."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2.0 * torch.randn(5, dim, generator=generator, dtype=torch.float64)
    cluster = (torch.randint(0, 9, (num_tokens,), generator=generator) - 4).clamp_min(0)
    noise = 0.5 * torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64)
    return (centres[cluster] + noise).to(dtype)


def some_context(router: nn.Module, num_tokens: int, *, mask: Tensor | None = None, seed: int = 0) -> RoutingContext:
    """A context with every field filled: ids below ``vocab_size`` (else 16) and ``num_tasks`` (else 2).

    Both numbers are attributes of the router or of its scorer.

    The tokens are `NUM_SEQUENCES` sequences one after the other.
    """
    generator = torch.Generator().manual_seed(seed)
    scorer = getattr(router, "scorer", None)
    vocabulary, tasks = (
        int(getattr(router, name, getattr(scorer, name, other)))
        for name, other in (("vocab_size", 16), ("num_tasks", 2))
    )
    token_ids = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    length = max(-(-num_tokens // NUM_SEQUENCES), 1)
    place = torch.arange(num_tokens)
    return RoutingContext(
        mask=mask,
        token_ids=token_ids,
        previous_ids=token_ids.roll(1),
        next_ids=token_ids.roll(-1),
        position=place % length,
        task=torch.randint(0, tasks, (num_tokens,), generator=generator),
        sequence=place // length,
    )


def some_mask(num_tokens: int) -> Tensor:
    """Bool[T]: about a third is padding, in places that are not only at the end."""
    return torch.arange(num_tokens) % 7 < 5


def random_routing(
    num_tokens: int,
    num_experts: int,
    k: int = 2,
    *,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Routing:
    """A routing that no router made: k random experts a token, weights that sum to 1, served in order of the list.

    With a `capacity` later assignments of a full expert are dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    expert = scores.topk(k, dim=1).indices.t().reshape(-1)
    weight = torch.rand(num_tokens, k, generator=generator, dtype=torch.float64) + 0.1
    place = one_hot(expert, num_experts).cumsum(0).gather(1, expert[:, None])[:, 0] - 1
    return Routing(
        token=torch.arange(num_tokens).repeat(k),
        expert=expert,
        weight=(weight / weight.sum(1, keepdim=True)).t().reshape(-1).to(dtype),
        position=place,
        kept=torch.ones_like(place, dtype=torch.bool) if capacity is None else place < capacity,
        num_tokens=num_tokens,
        num_experts=num_experts,
        capacity=capacity,
    )


def probe_like(hidden: Tensor) -> Tensor:
    """Fixed weights for the entries of `hidden`, all different, that make a scalar whose gradient tells everything."""
    return torch.cos(torch.arange(hidden.numel(), dtype=torch.float64)).view(hidden.shape).to(hidden.dtype)


def trace(
    call: Callable[[Tensor], MoEOutput | Tensor], module: nn.Module, x: Tensor, *, seed: int = 1
) -> dict[str, Tensor]:
    """Run `call` on `x` and the backward of a scalar made of everything it returned; all results by name.

    The scalar holds the output with fixed weights, the returned losses and deviations; the names are ``output``,
    ``loss <name>``, ``deviation <name>``, ``statistic <name>``, ``gradient of x`` and ``gradient of <parameter>``
    (zeros where autograd gives none). The gradients that `module` had are lost.
    """
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    with seeded(seed):
        out = call(x)
        hidden = out if isinstance(out, Tensor) else out.hidden
        found = {"output": hidden.detach()}
        objective = (hidden * probe_like(hidden)).sum()
        if isinstance(out, MoEOutput):
            for name, value in _reported(out.routing).items():
                found[name] = value.detach()
                if not name.startswith("statistic"):
                    objective = objective + 0.1 * value
        if objective.requires_grad:
            objective.backward()
    leaves = {"x": x, **dict(module.named_parameters())}
    for name, leaf in leaves.items():
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
    module.zero_grad(set_to_none=True)
    return found


def _reported(routing: Routing) -> dict[str, Tensor]:
    """What a routing has beside its assignments."""
    found = {f"loss {name}": loss for name, loss in routing.losses.items()}
    found |= {f"deviation {name}": part.total for name, part in routing.deviations.items()}
    return found | {f"statistic {name}": value for name, value in routing.statistics.items()}


def tensors_of(value: Any) -> dict[str, Tensor]:
    """The tensors in any nest of containers, numbered in a fixed order; for a `Routing`, by field."""
    if isinstance(value, Routing):
        names = ("token", "expert", "weight", "position", "kept")
        return {name: getattr(value, name) for name in names} | _reported(value)
    leaves = [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return {f"result {n}": leaf for n, leaf in enumerate(leaves)}
