"""Models of transformers in units: weights counted, and what each block costs measured by torch on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.layer import moe_layers
from moekit.parallel.layout import Training
from moekit.planner.census import Census, GatheredUnit, Weight, counted, weights_of
from moekit.planner.costs import Cost
from moekit.planner.measure import flop_counter

_DTYPES: Mapping[str, torch.dtype] = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def census_of(model: Any, training: Training) -> Census:
    """Weights and costs of an adopted model of transformers; parameters that are frozen count as such.

    Args:
        model: adopted, on the meta device; its type becomes that of the precision.
        training: micro-batch and precision, "32-true" or "bf16-true".

    Raises:
        UserError: another precision, or a length that is too large for the model's positions.

    Source: torch's own counts of one forward of the micro-batch, block by block, beside weights by formula. Differs:
        from `take_census`, whose costs are formulas of moekit's own transformers.
    """
    name = training.numbers.name
    if name not in _DTYPES:
        raise UserError(f"a model of transformers is planned in {' or '.join(_DTYPES)}: got {name}.")
    decoder = not model.config.is_encoder_decoder
    _check_length(model, training)
    model.to(_DTYPES[name]).train()
    blocks = {path: module for path, module in model.named_modules() if _is_block(module)}
    measured = _measure(model, blocks, _inputs(model, training, decoder=decoder))
    taken: set[int] = set()
    units: list[GatheredUnit] = []
    width: int = model.get_input_embeddings().weight.shape[1]
    for path, block in blocks.items():
        causal = decoder or "decoder" in path.split(".")
        t = training.target_tokens if causal else training.source_tokens
        weights = weights_of(block, taken)
        sent = sum(layer.router.choices_per_token * t * width for _, layer in moe_layers(block))
        kind = "sparse block" if sent else "block"
        cost = Cost(flops=measured[path].flops, measured=measured[path].kept, sent=sent, frozen=_frozen(weights, t))
        side = "decoder" if causal else "encoder"
        units.append(GatheredUnit("block", f"{side} {kind}", weights, cost, entry=float(t * width)))
    t = training.target_tokens
    tables = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    table_weights = sum((weights_of(table, taken) for table in tables), ())
    v, d = tables[0].weight.shape
    rest = measured[""]
    trained = tables[-1].weight.requires_grad
    cost = Cost(flops=2.0 * t * v * d, frozen=0.0 if trained else 2.0 * t * v * d)
    units.append(GatheredUnit("vocabulary", "tables and logits", table_weights, cost, logits=float(t * v)))
    others = Cost(flops=max(0.0, rest.flops - cost.flops), measured=rest.kept)
    units.append(GatheredUnit("rest", "norms and heads", weights_of(model, taken), others))
    return Census(type(model).__name__, counted(units))


@dataclass
class _Part:
    """Operations of a part's forward, and bytes that autograd keeps of it."""

    flops: float = 0.0
    kept: float = 0.0


def _is_block(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _check_length(model: Any, training: Training) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and max(training.source_length, training.target_length) > longest:
        raise UserError(
            f"{type(model).__name__} has {longest} positions: got sequences of "
            f"{max(training.source_length, training.target_length)} tokens. Give a smaller --length."
        )


def _inputs(model: Any, training: Training, *, decoder: bool) -> dict[str, Any]:
    def ids(length: int) -> Tensor:
        return torch.zeros(training.sequences, length, dtype=torch.int64, device="meta")

    if not decoder:
        return {"input_ids": ids(training.source_length), "decoder_input_ids": ids(training.target_length)}
    given: dict[str, Any] = {"input_ids": ids(training.target_length)}
    if model.config._attn_implementation != "eager":
        # What a mask of two dimensions would be read for is not there; this one is taken as it is.
        length = training.target_length
        given["attention_mask"] = torch.ones(training.sequences, 1, length, length, dtype=torch.bool, device="meta")
    return given


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: its inputs, its result, and the logarithm of each softmax's denominator."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # as the kernels lay it
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _Attention:
    """Stands in for torch's attention, which on the meta device would keep its probabilities; counts operations."""

    def __init__(self) -> None:
        self.flops = 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = math.prod(query.shape[:-1])
        self.flops += 2.0 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        out: Tensor = _FusedAttention.apply(query, key, value)
        return out


def _measure(model: Any, parts: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, _Part]:
    """What torch counts of one forward, by part; "" = outside of all."""
    found = {path: _Part() for path in ("", *parts)}
    inside: list[str] = [""]
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own and key not in held:
            held[key] = tensor  # so that no other storage gets its address
            found[inside[-1]].kept += tensor.untyped_storage().nbytes()
        return tensor

    counter = flop_counter()

    began: dict[str, float] = {}

    def enter_of(path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            inside.append(path)
            began[path] = counter.get_total_flops() + attention.flops

        return enter

    def leave_of(path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            inside.pop()
            found[path].flops += counter.get_total_flops() + attention.flops - began[path]

        return leave

    from transformers.integrations import sdpa_attention

    attention = _Attention()
    with ExitStack() as hooks:
        # Heads that share keys and values are not repeated for a kernel: with a mask they would be.
        for owner, name, stand_in in (
            (nn.functional, "scaled_dot_product_attention", attention),
            (sdpa_attention, "use_gqa_in_sdpa", lambda *given: True),
        ):
            hooks.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stand_in)
        for path, part in parts.items():
            hooks.callback(part.register_forward_pre_hook(enter_of(path)).remove)
            hooks.callback(part.register_forward_hook(leave_of(path)).remove)
        with torch.enable_grad(), counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**inputs, use_cache=False)
    found[""].flops = counter.get_total_flops() + attention.flops - sum(part.flops for part in found.values())
    return found


def _frozen(weights: tuple[Weight, ...], t: int) -> float:
    """Operations of backward that need no gradient of a matrix: two for each of its numbers that a token passes."""
    return sum(
        2.0 * t * weight.numel * weight.active for weight in weights if not weight.trained and len(weight.shape) > 1
    )
