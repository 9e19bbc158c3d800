"""NllbMoe: its configuration and the names of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from moekit.errors import UserError
from moekit.huggingface.architecture import Architecture, SecondExpert
from moekit.huggingface.fields import Fields, their_activation
from moekit.huggingface.links import Link
from moekit.huggingface.scales import Factors, factors
from moekit.transformer import Side
from moekit.transformer.embedding import EmbeddingScale

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 128112, "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096, "encoder_attention_heads": 16, "decoder_attention_heads": 16, "encoder_sparse_step": 4,
    "decoder_sparse_step": 4, "num_experts": 128, "activation_function": "relu", "scale_embedding": True,
    "router_bias": False, "router_dtype": "float32", "second_expert_policy": "all", "dropout": 0.1,
    "attention_dropout": 0.1, "activation_dropout": 0.0, "normalize_router_prob_before_dropping": False,
    "moe_token_dropout": 0.2, "tie_word_embeddings": True, "pad_token_id": 1,
}  # fmt: skip
_LAYER_NORM_EPS = 1e-5
"""Not a setting there."""


def architecture_of(config: Mapping[str, Any], where: str, *, dropless: bool) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Args:
        config: its content.
        where: begins messages.
        dropless: leave the capacity out.

    Raises:
        UserError: if a field is wrong, or is of something that moekit does not compute.
    """
    fields = Fields(config, _DEFAULTS, where)
    fields.require("router_bias", False, " Routers of moekit have no bias.")
    fields.require("router_dtype", "float32", " Routers of moekit compute in float32.")
    heads, dim = fields.integer("encoder_attention_heads", 1), fields.integer("d_model", 1)
    fields.require("decoder_attention_heads", heads, " Encoder and decoder must have as many heads.")
    if dim % heads:
        raise UserError(f"{where}: d_model must be divisible by encoder_attention_heads: got {dim} and {heads}.")
    layers: dict[Side, int] = {side: fields.integer(f"{side}_layers", 1) for side in ("encoder", "decoder")}
    sparse = {side: _sparse(fields.integer(f"{side}_sparse_step"), count) for side, count in layers.items()}
    fraction = config.get("moe_eval_capacity_token_fraction", 1.0)
    if any(sparse.values()) and not dropless and (not isinstance(fraction, int | float) or fraction < 1):
        raise UserError(
            f"{where}: moe_eval_capacity_token_fraction must be 1, which drops nothing: got {fraction!r}, by which the "
            "result for a sentence depends on what it is batched with. Import it dropless."
        )
    before = fields.flag("normalize_router_prob_before_dropping")
    second = fields.word("second_expert_policy", ("all", "sampling", "random"))
    policies: dict[str, SecondExpert] = {"all": "all", "sampling": "sampling", "random": "random"}
    return Architecture(
        kind="nllb-moe",
        vocab_size=fields.integer("vocab_size", 1),
        dim=dim,
        heads=heads,
        head_dim=dim // heads,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_hidden_dim=fields.integer("encoder_ffn_dim", 1),
        decoder_hidden_dim=fields.integer("decoder_ffn_dim", 1),
        encoder_sparse=sparse["encoder"],
        decoder_sparse=sparse["decoder"],
        num_experts=fields.integer("num_experts", 1),
        activation=fields.activation("activation_function"),
        norm_eps=_LAYER_NORM_EPS,
        tied=fields.flag("tie_word_embeddings"),
        bias=True,
        embedding_scale="input" if fields.flag("scale_embedding") else "none",
        attention_scale=None,
        first_position=fields.integer("pad_token_id") + 1,
        renormalise="before_drop" if before else "after_drop",
        second_expert=policies[second],
        output_masking=fields.number("moe_token_dropout"),
        dropout=fields.number("dropout"),
        attention_dropout=fields.number("attention_dropout"),
        hidden_dropout=fields.number("activation_dropout"),
    )


def config_of(ours: Architecture) -> dict[str, Any]:
    """Fields of ``config.json``, without those that both families have.

    Raises:
        UserError: if the sparse layers are not where NllbMoe can have them, or norms have another epsilon.
    """
    if ours.norm_eps != _LAYER_NORM_EPS:
        raise UserError(
            f"transformers' NllbMoeForConditionalGeneration has norms with epsilon {_LAYER_NORM_EPS:g}: this model has "
            f"{ours.norm_eps:g}."
        )
    steps = {side: _step_of(side, ours.sparse[side], count) for side, count in ours.layers.items()}
    return {
        "d_model": ours.dim,
        "encoder_layers": ours.encoder_layers,
        "decoder_layers": ours.decoder_layers,
        "encoder_ffn_dim": ours.encoder_hidden_dim,
        "decoder_ffn_dim": ours.decoder_hidden_dim,
        "encoder_attention_heads": ours.heads,
        "decoder_attention_heads": ours.heads,
        "encoder_sparse_step": steps["encoder"],
        "decoder_sparse_step": steps["decoder"],
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "num_experts": ours.num_experts,
        "activation_function": their_activation(ours.activation),
        "scale_embedding": _embedding_scale(ours) == "input",
        "router_bias": False,
        "router_dtype": "float32",
        "second_expert_policy": "all",
        "normalize_router_prob_before_dropping": ours.renormalise == "before_drop",
        "batch_prioritized_routing": False,
        "moe_eval_capacity_token_fraction": 1.0,
        "moe_token_dropout": ours.output_masking,
        "dropout": ours.dropout,
        "attention_dropout": ours.attention_dropout,
        "activation_dropout": ours.hidden_dropout,
    }


def links(ours: Architecture) -> Iterator[Link]:
    """Every tensor of ours and theirs."""
    scale = factors(ours, _embedding_scale(ours), None)
    if ours.tied:
        yield Link("embedding.weight", ("model.shared.weight",), factors=(scale.embedding,))
    else:
        yield Link("embedding.weight", ("model.encoder.embed_tokens.weight",), factors=(scale.embedding,))
        yield Link("target_embedding.weight", ("model.decoder.embed_tokens.weight",), factors=(scale.embedding,))
        yield Link("output.weight", ("lm_head.weight",), factors=(scale.output,))
    for side, count in ours.layers.items():
        yield from _norm(f"{side}.norm", f"model.{side}.layer_norm")
        for number in range(count):
            yield from _block(ours, side, number, scale)


def synonyms(ours: Architecture) -> dict[str, tuple[str, ...]]:
    """Other names under which a checkpoint may hold a table, or hold it once more."""
    if ours.tied:
        others = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
        return {"model.shared.weight": others}
    shared = ("model.shared.weight",)
    return {"model.encoder.embed_tokens.weight": shared, "model.decoder.embed_tokens.weight": shared}


def with_form(ours: Architecture, form: Mapping[str, Any]) -> Architecture:
    """The architecture with the scales and the biases, or none, that a model had before it was exported."""
    return dataclasses.replace(
        ours, embedding_scale=form["embedding_scale"], attention_scale=form["attention_scale"], bias=form["bias"]
    )


def _block(ours: Architecture, side: Side, number: int, scale: Factors) -> Iterator[Link]:
    mine, yours = f"{side}.layers.{number}", f"model.{side}.layers.{number}"
    dim = ours.dim
    names = tuple(f"{yours}.self_attn.{part}_proj" for part in "qkv")
    queries = (scale.queries, 1.0, 1.0)
    yield from _linear(ours, f"{mine}.self_attention.qkv", names, (3, dim), "parts", queries)
    yield from _linear(ours, f"{mine}.self_attention.out", (f"{yours}.self_attn.out_proj",), (dim,))
    yield from _norm(f"{mine}.self_attention_norm", f"{yours}.self_attn_layer_norm")
    if side == "decoder":
        cross = f"{yours}.cross_attention"
        yield from _linear(ours, f"{mine}.cross_attention.q", (f"{cross}.q_proj",), (dim,), "same", (scale.queries,))
        yield from _linear(
            ours, f"{mine}.cross_attention.kv", (f"{cross}.k_proj", f"{cross}.v_proj"), (2, dim), "parts"
        )
        yield from _linear(ours, f"{mine}.cross_attention.out", (f"{cross}.out_proj",), (dim,))
        yield from _norm(f"{mine}.cross_attention_norm", f"{yours}.cross_attention_layer_norm")
    yield from _norm(f"{mine}.feed_forward_norm", f"{yours}.ff_layer_norm")
    feed, sizes = f"{mine}.feed_forward", {"in": ours.hidden_dim[side], "out": dim}
    layers = {"in": "fc1", "out": "fc2"}
    if number not in ours.sparse[side]:
        for part, name in layers.items():
            yield from _linear(ours, f"{feed}.w_{part}", (f"{yours}.ffn.{name}",), (sizes[part],))
        return
    yield Link(f"{feed}.router.weight", (f"{yours}.ffn.router.classifier.weight",))
    for part, name in layers.items():
        experts = tuple(f"{yours}.ffn.experts.expert_{e}.{name}" for e in range(ours.num_experts))
        weights, biases = (tuple(f"{e}.{kind}" for e in experts) for kind in ("weight", "bias"))
        yield Link(f"{feed}.experts.w_{part}", weights, "transposed experts")
        shape = (ours.num_experts, sizes[part])
        yield Link(f"{feed}.experts.b_{part}" if ours.bias else "", biases, "experts", shape=shape)


def _linear(
    ours: Architecture,
    mine: str,
    names: tuple[str, ...],
    shape: tuple[int, ...],
    form: Any = "same",
    scales: tuple[float, ...] = (),
) -> Iterator[Link]:
    """Weight and bias; where we have no bias theirs is zero."""
    yield Link(f"{mine}.weight", tuple(f"{name}.weight" for name in names), form, scales)
    biases = tuple(f"{name}.bias" for name in names)
    yield Link(f"{mine}.bias" if ours.bias else "", biases, form, scales, shape)


def _norm(mine: str, yours: str) -> Iterator[Link]:
    for kind in ("weight", "bias"):
        yield Link(f"{mine}.{kind}", (f"{yours}.{kind}",))


def _embedding_scale(ours: Architecture) -> EmbeddingScale:
    """Theirs multiplies by sqrt(D) on the way in, or does nothing; ours on the way out becomes the first."""
    return "none" if ours.embedding_scale == "none" else "input"


def _sparse(step: int, layers: int) -> tuple[int, ...]:
    """Their rule: the last of every `step` layers; none for 0."""
    return tuple(i for i in range(layers) if step and (i + 1) % step == 0)


def _step_of(side: Side, sparse: tuple[int, ...], layers: int) -> int:
    for step in range(layers + 1):
        if _sparse(step, layers) == sparse:
            return step
    raise UserError(
        "transformers' NllbMoeForConditionalGeneration has the last of every n layers sparse, or none: the "
        f"{side} of this model has layers {', '.join(map(str, sparse))} of {layers}."
    )
