"""How much each expert of a model matters, measured while it computes: how often it is used, and what it adds.

with watch_experts(model) as use, torch.no_grad():
    model(...)                        # as often as there is text
kept = choose_experts(sparse_layers(model), 0.5, "reap", load={path: one.saliency for path, one in use.items()})
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.experts import Experts
from moekit.layer import MoELayer, MoEOutput, moe_layers
from moekit.routing import Routing


@dataclass(frozen=True)
class ExpertUse:
    """What was measured of a layer's experts.

    Attributes:
        tokens: Int64[E], how many tokens each expert computed.
        activation: Float64[E], the sum over these of the router's weight times the norm of the expert's output.
    """

    tokens: Tensor
    activation: Tensor

    @property
    def load(self) -> Tensor:
        """Float64[E]: the share of assignments that each expert gets; 0 where there is none."""
        return self.tokens / self.tokens.sum().clamp(min=1)

    @property
    def saliency(self) -> Tensor:
        """Float64[E]: REAP, the mean of weight times norm over the tokens that were sent to each; 0 where none was.

        Source: arXiv:2510.13999, the criterion of router-weighted expert activation pruning. Differs: its text was not
            at hand, only its abstract and public implementations; the weight is the one that the model multiplies the
            output with, renormalised or scaled where the model does so.
        """
        return self.activation / self.tokens.clamp(min=1)

    def __add__(self, other: ExpertUse) -> ExpertUse:
        return ExpertUse(self.tokens + other.tokens, self.activation + other.activation)


@torch.no_grad()
def expert_use(experts: Experts, x: Tensor, routing: Routing) -> ExpertUse:
    """What a layer's experts do with some tokens; the experts are computed for it.

    Args:
        experts: the bank, all of it in this process.
        x: Float[T, D], what the layer was given.
        routing: what its router returned for it; assignments that were dropped do not count.
    """
    kept = routing.kept & routing.queued
    expert, token, weight = routing.expert[kept], routing.token[kept], routing.weight[kept]
    order = expert.argsort(stable=True)
    tokens = torch.bincount(expert, minlength=routing.num_experts)
    out = experts(x[token[order]], tokens)
    norms = out.to(torch.float32).norm(dim=-1).to(torch.float64)
    activation = torch.zeros(routing.num_experts, dtype=torch.float64, device=x.device)
    activation.index_add_(0, expert[order], weight[order].to(torch.float64) * norms)
    return ExpertUse(tokens.cpu(), activation.cpu())


@contextmanager
def watch_experts(model: nn.Module) -> Iterator[dict[str, ExpertUse]]:
    """Inside, all forwards of a model's sparse layers are measured, by the paths of `sparse_layers`.

    A layer that computed nothing is not there. It costs the experts' computation once more. The model should evaluate:
    what training adds at random to a layer's input is not seen here.

    Raises:
        ValueError: the experts of a layer are spread over several processes.
    """
    found: dict[str, ExpertUse] = {}
    hooks = []
    for path, layer in moe_layers(model):
        for name, held in layer.experts.named_parameters():
            axes = layer.experts.axes.get(name, ())
            here = held.shape[axes.index("expert")] if "expert" in axes else layer.num_experts
            if here != layer.num_experts:
                raise ValueError(f"the experts of {path} must all be in this process: got {here}.")

        def note(layer: MoELayer, args: Any, kwargs: Any, output: MoEOutput, path: str = path) -> None:
            x = args[0] if args else kwargs["x"]
            one = expert_use(layer.experts, x.detach().reshape(-1, x.shape[-1]), output.routing)
            found[path] = found[path] + one if path in found else one

        hooks.append(layer.register_forward_hook(note, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
