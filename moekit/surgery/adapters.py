"""Low-rank adapters (LoRA) on experts and on dense linear layers: few parameters to train, merged exactly afterwards.

    add_adapters(model, rank=8, targets=("experts", "attention"))
    ...                                  # train what `moekit.training.fine_tuning.subset("adapters")` names
    merge_adapters(model)                # the same function, without adapters

The adapted model's tensors keep their names; pairs are added to them: ``...experts.adapters.w_in.down`` beside
``...experts.w_in``, ``...qkv.adapter.down`` beside ``...qkv.weight``. So a checkpoint from before loads into the model
(`load_state_dict` before `add_adapters`), and `merged_state` gives one without adapters back. Those of experts whose
matrices lie outputs first are ``...experts.transposed_adapters.gate_up_proj.down``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.experts.base import Experts, product
from moekit.routers.scorers import BiasedLinearScorer, LinearScorer, ScoredRouter
from moekit.routing import Router
from moekit.transformer.attention import CrossAttention, SelfAttention
from moekit.transformer.feed_forward import GLU, MLP
from moekit.transformer.projection import FusedLinear

Target = Literal["experts", "routers", "attention", "feed_forward"]

_DENSE: Mapping[str, tuple[type[nn.Module], ...]] = {
    "attention": (SelfAttention, CrossAttention),
    "feed_forward": (MLP, GLU),
}
_OF_TRANSFORMERS: Mapping[str, tuple[str, ...]] = {
    "attention": ("Attention",),
    "feed_forward": ("MLP", "DenseActDense"),
}
"""Ends of the names of classes of transformers, whose `torch.nn.Linear` layers count as those of this package do."""


class LowRank(nn.Module):
    """A pair of thin matrices whose product is added to a matrix: scale * (x down) up.

    `down` is drawn (normal, variance 1 / fan-in) and `up` is zero, so that nothing changes at first. Leading dimensions
    are the matrix's own: one pair for each expert, or for each of a fused projection's maps.

    Args:
        matrix: Float[*leading, inputs, outputs], for shape, device and type.
        rank: r.
        alpha: scale = alpha / r.

    Raises:
        ValueError: if the rank is below 1 or above both sides of the matrix.

    Source: arXiv:2106.09685 section 4.1. Differs: no dropout on the adapter's input.
    """

    scale: Tensor

    def __init__(self, matrix: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        *leading, inputs, outputs = matrix.shape
        if not 1 <= rank <= min(inputs, outputs):
            raise ValueError(
                f"rank must be in 1..{min(inputs, outputs)} for a matrix of {inputs} x {outputs}: got {rank}."
            )
        self.rank, self.alpha = rank, alpha
        self.down = nn.Parameter(matrix.new_empty((*leading, inputs, rank)))
        self.up = nn.Parameter(matrix.new_empty((*leading, rank, outputs)))
        self.register_buffer("scale", torch.tensor(alpha / rank, dtype=torch.float32, device=matrix.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw `down` anew; `up` becomes zero."""
        if not self.down.is_meta:
            self.scale.fill_(self.alpha / self.rank)  # which has no value yet where it was built without memory
            self.down.normal_(std=self.down.shape[-2] ** -0.5)
            self.up.zero_()

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rank={self.rank}, alpha={self.alpha}"

    def product(self) -> Tensor:
        """Float[*leading, inputs, outputs]: what is added to the matrix."""
        return self.scale.to(self.up.dtype) * (self.down @ self.up)


class ExpertAdapter(LowRank):
    """A pair for each expert, on the rows that the dispatcher has grouped."""

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        """What is added to the product of `rows`, packed or padded as in `Experts.forward`."""
        out = product(product(rows, self.down, counts), self.up, counts)
        return out * self.scale.to(out.dtype)


class LinearAdapter(LowRank):
    """A pair for a linear layer, or one for each map of a fused one."""

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output: Float[..., inputs] to Float[..., outputs] or Float[..., P, outputs]."""
        if self.down.ndim == 2:
            out = x @ self.down @ self.up
        else:
            out = torch.einsum("...pr,pro->...po", torch.einsum("...i,pir->...pr", x, self.down), self.up)
        return out * self.scale.to(out.dtype)


def _add(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of an adapted linear layer: a function of the module, so that copies and pickles keep it."""
    return output + layer.adapter(arguments[0])  # type: ignore[operator]


def add_adapters(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Collection[Target] = ("experts", "attention", "feed_forward"),
) -> list[str]:
    """Give every matrix of the targets a `LowRank` pair, in place; the function stays the same until it is trained.

    Args:
        model: with its weights.
        rank: r; a multiple of 8 suits grouped products on accelerators.
        alpha: the pair's product counts alpha / r.
        targets: "experts" = matrices of all expert banks, "attention" = its projections, "feed_forward" = dense
            feed-forwards, shared branches of sparse layers included, both also in adopted models of transformers;
            "routers" = the scores of routers with one matrix for them. Embeddings, norms and heads get none.

    Returns:
        Names of the new parameters.

    Raises:
        ValueError: an unknown target, no matrix found, adapters already there, a bank or router that takes none, or a
            rank that does not fit.

    Source: arXiv:2106.09685.
    """
    unknown = sorted(set(targets) - set(get_args(Target)))
    if unknown or not targets:
        raise ValueError(f"targets must be some of {', '.join(get_args(Target))}: got {unknown or 'none'}.")
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise ValueError("the model has adapters already: merge them first (merge_adapters).")
    found = list(_matrices(model, targets))
    if not found:
        raise ValueError(f"the model must have a matrix of {' or '.join(targets)}: it has none.")
    for layer, path in found:
        attach(layer, path, rank, alpha)
    return [name for name, _ in model.named_parameters() if is_adapter(name)]


def attach(layer: nn.Module, path: str, rank: int, alpha: float) -> LowRank:
    """Give one matrix its pair: the function stays the same until it is trained.

    Args:
        layer: a bank, a router, or a module that holds a linear layer.
        path: the matrix, by its name in `layer`.
        rank: r.
        alpha: the pair's product counts alpha / r.

    Raises:
        ValueError: the rank does not fit.
    """
    # The module that names a matrix's axes names its adapter's: what divides the layer divides them together.
    named: Mapping[str, tuple[str, ...]] = getattr(layer, "axes", {})
    axes = tuple(named.get(path, ()))
    pair: LowRank
    if isinstance(layer, Experts):
        pair = ExpertAdapter(layer.inputs_first(path), rank, alpha)
        if layer.adapters_name not in layer._modules:
            layer.add_module(layer.adapters_name, nn.ModuleDict())
        layer.get_submodule(layer.adapters_name).add_module(path, pair)
        where, transposed = f"{layer.adapters_name}.{path}", layer.outputs_first
    else:
        stem = path.removesuffix("weight").removesuffix(".")
        where, transposed = f"{stem}.adapter".lstrip("."), True
        linear = layer.get_submodule(stem)
        pair = LinearAdapter(linear.get_parameter("weight").transpose(-1, -2), rank, alpha)
        linear.add_module("adapter", pair)
        if not isinstance(linear, Router):  # which asks for its pair itself
            linear.__dict__["_adapter_hook"] = linear.register_forward_hook(_add)
    if axes:
        *front, inner, outer = (*axes[:-2], axes[-1], axes[-2]) if transposed else axes
        pairs = {f"{where}.down": (*front, inner, "rank"), f"{where}.up": (*front, "rank", outer)}
        layer.__dict__["axes"] = {**named, **pairs}
    return pair


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add every pair's product to its matrix and remove the pair, in place. Nothing happens where there are none."""
    state = model.state_dict()
    merged = merged_state(state)
    changed = [name for name in merged if merged[name] is not state[name]]
    for module in list(model.modules()):
        if isinstance(module.__dict__.get("axes"), Mapping):
            module.__dict__["axes"] = {n: axes for n, axes in module.__dict__["axes"].items() if not is_adapter(n)}
        if isinstance(module, Experts) and module.adapters_name in module._modules:
            del module._modules[module.adapters_name]
        elif isinstance(module._modules.get("adapter"), LowRank):
            handle: RemovableHandle | None = module.__dict__.pop("_adapter_hook", None)
            if handle is not None:
                handle.remove()
            del module._modules["adapter"]
    for name in changed:
        state[name].copy_(merged[name])


def merged_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without adapters: their products are added to the matrices, in float32.

    Tensors that have no adapter are the very same objects.
    """
    merged = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    for name in state:
        if not is_adapter(name) or not name.endswith(".down"):
            continue
        stem = name.removesuffix(".down")
        down, up = (state[f"{stem}.{part}"].float() for part in ("down", "up"))
        added = state[f"{stem}.scale"].float() * (down @ up)
        parts = stem.split(".")
        if parts[-1] == "adapter":
            matrix, added = ".".join([*parts[:-1], "weight"]), added.transpose(-1, -2)
        else:
            matrix = ".".join([*parts[:-2], parts[-1]])
            added = added.transpose(-1, -2) if parts[-2] == "transposed_adapters" else added
        merged[matrix] = (merged[matrix].float() + added).to(merged[matrix].dtype)
    return merged


def is_adapter(name: str) -> bool:
    """Whether a tensor of that name is part of an adapter."""
    parts = name.split(".")
    banks = ("adapters", "transposed_adapters")
    return parts[-1] in ("down", "up", "scale") and (parts[-2:-1] == ["adapter"] or "".join(parts[-3:-2]) in banks)


def _matrices(model: nn.Module, targets: Collection[str]) -> Iterator[tuple[nn.Module, str]]:
    """Every matrix to adapt once: the module that names its axes, and its name there."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, Experts) and "experts" in targets:
            if not module.matrices and not any(isinstance(inner, Experts) for inner in module.children()):
                raise ValueError(
                    f"the bank {type(module).__name__} takes no adapters: it must multiply through Experts.times, and "
                    "name what it multiplies with in `matrices`. Leave experts out of the targets."
                )
            for name in module.matrices:
                yield module, name
        elif isinstance(module, Router) and "routers" in targets:
            if isinstance(module, ScoredRouter) and type(module.scorer) in (LinearScorer, BiasedLinearScorer):
                yield module, "weight"
            elif next(module.parameters(), None) is not None:
                raise ValueError(
                    f"the router {type(module).__name__} takes no adapters: its scores must be one matrix times the "
                    "token. Leave routers out of the targets."
                )
        elif any(is_dense_part(module, target) for target in targets):
            for path, inner in module.named_children():
                if isinstance(inner, nn.Linear | FusedLinear) and id(inner) not in seen:
                    seen.add(id(inner))
                    yield module, f"{path}.weight"


def is_dense_part(module: nn.Module, target: str) -> bool:
    """Whether a module counts as "attention" or "feed_forward", those of transformers by the ends of their names."""
    kind = type(module)
    if isinstance(module, _DENSE.get(target, ())):
        return True
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith(_OF_TRANSFORMERS.get(target, ()))
