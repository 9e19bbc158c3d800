"""SwitchTransformers: its configuration and the names of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from moekit.errors import UserError
from moekit.huggingface.architecture import Architecture
from moekit.huggingface.fields import Fields, their_activation
from moekit.huggingface.links import Link
from moekit.huggingface.scales import Factors, factors
from moekit.transformer import Side
from moekit.transformer.embedding import EmbeddingScale

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "expert_capacity": 64, "num_layers": 12,
    "num_sparse_encoder_layers": 3, "num_decoder_layers": 12, "num_sparse_decoder_layers": 3, "num_heads": 12,
    "num_experts": 8, "router_bias": False, "router_jitter_noise": 0.01, "router_dtype": "float32",
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6, "dense_act_fn": "relu", "tie_word_embeddings": True,
}  # fmt: skip
_NO_LIMIT = 2**31 - 1
"""The capacity that stands for dropless: more than a sequence has tokens."""
_SPARSE = {"encoder": "num_sparse_encoder_layers", "decoder": "num_sparse_decoder_layers"}


def architecture_of(config: Mapping[str, Any], where: str, *, dropless: bool) -> Architecture:
    """The architecture that a ``config.json`` describes, with T5's scales.

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
    if not fields.has("num_decoder_layers"):
        fields = Fields({**config, "num_decoder_layers": fields.integer("num_layers", 1)}, _DEFAULTS, where)
    layers: dict[Side, int] = {
        "encoder": fields.integer("num_layers", 1),
        "decoder": fields.integer("num_decoder_layers", 1),
    }
    sparse = {side: _sparse(_step(fields, side, count), count) for side, count in layers.items()}
    limit = fields.integer("expert_capacity", 1)
    tied = fields.flag("tie_word_embeddings")
    rate = fields.number("dropout_rate")
    d_ff = fields.integer("d_ff", 1)
    return Architecture(
        kind="switch_transformers",
        vocab_size=fields.integer("vocab_size", 1),
        dim=fields.integer("d_model", 1),
        heads=fields.integer("num_heads", 1),
        head_dim=fields.integer("d_kv", 1),
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_hidden_dim=d_ff,
        decoder_hidden_dim=d_ff,
        encoder_sparse=sparse["encoder"],
        decoder_sparse=sparse["decoder"],
        num_experts=fields.integer("num_experts", 1),
        activation=fields.activation("dense_act_fn"),
        norm_eps=fields.number("layer_norm_epsilon"),
        tied=tied,
        embedding_scale=_embedding_scale(tied),
        attention_scale=1.0,
        num_buckets=fields.integer("relative_attention_num_buckets", 1),
        max_distance=fields.integer("relative_attention_max_distance", 1),
        jitter=fields.number("router_jitter_noise"),
        limit=None if dropless or limit >= _NO_LIMIT else limit,
        dropout=rate,
        attention_dropout=rate,
        hidden_dropout=rate,
        final_dropout=rate,
    )


def config_of(ours: Architecture) -> dict[str, Any]:
    """Fields of ``config.json``, without those that both families have.

    Raises:
        UserError: if the sparse layers are not where SwitchTransformers can have them.
    """
    steps = {side: _step_of(side, ours.sparse[side], count) for side, count in ours.layers.items()}
    return {
        "d_model": ours.dim,
        "d_kv": ours.head_dim,
        "d_ff": ours.encoder_hidden_dim,
        "num_layers": ours.encoder_layers,
        "num_decoder_layers": ours.decoder_layers,
        "num_heads": ours.heads,
        "num_experts": ours.num_experts,
        "num_sparse_encoder_layers": _count_for(steps["encoder"], ours.encoder_layers),
        "num_sparse_decoder_layers": _count_for(steps["decoder"], ours.decoder_layers),
        "encoder_sparse_step": steps["encoder"],
        "decoder_sparse_step": steps["decoder"],
        "expert_capacity": _NO_LIMIT if ours.limit is None else ours.limit,
        "router_bias": False,
        "router_dtype": "float32",
        "router_jitter_noise": ours.jitter,
        "relative_attention_num_buckets": ours.num_buckets,
        "relative_attention_max_distance": ours.max_distance,
        "dropout_rate": ours.dropout,
        "layer_norm_epsilon": ours.norm_eps,
        "dense_act_fn": their_activation(ours.activation),
    }


def links(ours: Architecture) -> Iterator[Link]:
    """Every tensor of ours and theirs."""
    scale = factors(ours, _embedding_scale(ours.tied), 1.0)
    yield from _tables(ours, scale)
    for side, count in ours.layers.items():
        yield Link(
            f"{side}.positions.weight", (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)
        )
        yield Link(f"{side}.norm.weight", (f"{side}.final_layer_norm.weight",))
        for number in range(count):
            yield from _block(ours, side, number, scale)


def synonyms(ours: Architecture) -> dict[str, tuple[str, ...]]:
    """Other names under which a checkpoint may hold a table, or hold it once more."""
    if ours.tied:
        return {"shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}
    return {"encoder.embed_tokens.weight": ("shared.weight",), "decoder.embed_tokens.weight": ("shared.weight",)}


def _tables(ours: Architecture, scale: Factors) -> Iterator[Link]:
    if ours.tied:
        yield Link("embedding.weight", ("shared.weight",), factors=(scale.embedding,))
        return
    yield Link("embedding.weight", ("encoder.embed_tokens.weight",), factors=(scale.embedding,))
    yield Link("target_embedding.weight", ("decoder.embed_tokens.weight",), factors=(scale.embedding,))
    yield Link("output.weight", ("lm_head.weight",), factors=(scale.output,))


def _block(ours: Architecture, side: Side, number: int, scale: Factors) -> Iterator[Link]:
    mine, yours = f"{side}.layers.{number}", f"{side}.block.{number}.layer"
    attention = f"{yours}.0.SelfAttention"
    yield Link(
        f"{mine}.self_attention.qkv.weight",
        tuple(f"{attention}.{part}.weight" for part in "qkv"),
        "parts",
        (scale.queries, 1.0, 1.0),
    )
    yield Link(f"{mine}.self_attention.out.weight", (f"{attention}.o.weight",))
    yield Link(f"{mine}.self_attention_norm.weight", (f"{yours}.0.layer_norm.weight",))
    if side == "decoder":
        cross = f"{yours}.1.EncDecAttention"
        yield Link(f"{mine}.cross_attention.q.weight", (f"{cross}.q.weight",), factors=(scale.queries,))
        yield Link(f"{mine}.cross_attention.kv.weight", (f"{cross}.k.weight", f"{cross}.v.weight"), "parts")
        yield Link(f"{mine}.cross_attention.out.weight", (f"{cross}.o.weight",))
        yield Link(f"{mine}.cross_attention_norm.weight", (f"{yours}.1.layer_norm.weight",))
    last = f"{yours}.{2 if side == 'decoder' else 1}"
    yield Link(f"{mine}.feed_forward_norm.weight", (f"{last}.layer_norm.weight",))
    feed = f"{mine}.feed_forward"
    if number not in ours.sparse[side]:
        yield Link(f"{feed}.w_in.weight", (f"{last}.mlp.wi.weight",))
        yield Link(f"{feed}.w_out.weight", (f"{last}.mlp.wo.weight",))
        return
    yield Link(f"{feed}.router.weight", (f"{last}.mlp.router.classifier.weight",))
    for name, part in (("w_in", "wi"), ("w_out", "wo")):
        experts = tuple(f"{last}.mlp.experts.expert_{e}.{part}.weight" for e in range(ours.num_experts))
        yield Link(f"{feed}.experts.{name}", experts, "transposed experts")


def _embedding_scale(tied: bool) -> EmbeddingScale:
    """Theirs divides hidden states by sqrt(D) where one table is both, and else nothing."""
    return "output" if tied else "none"


def _step(fields: Fields, side: Side, layers: int) -> int:
    """Theirs: derived from the number of sparse layers, unless the file says it."""
    if fields.has(f"{side}_sparse_step"):
        return fields.integer(f"{side}_sparse_step")
    wanted = fields.integer(_SPARSE[side])
    return layers // wanted if wanted else layers


def _sparse(step: int, layers: int) -> tuple[int, ...]:
    """Their rule: of every `step` layers the second, all for 1, none for 0."""
    return tuple(i for i in range(layers) if step and (step == 1 or i % step == 1))


def _step_of(side: Side, sparse: tuple[int, ...], layers: int) -> int:
    for step in range(layers + 2):
        if _sparse(step, layers) == sparse:
            return step
    raise UserError(
        "transformers' SwitchTransformersForConditionalGeneration has the second of every n layers sparse (1, 1 + n, "
        f"...), or all, or none: the {side} of this model has layers {', '.join(map(str, sparse))} of {layers}."
    )


def _count_for(step: int, layers: int) -> int:
    """A number of sparse layers from which their rule derives the step; 0 where only the step itself can say it."""
    counts = (n for n in range(1, layers + 2) if layers // n == step)
    return next(counts, 0)


def with_form(ours: Architecture, form: Mapping[str, Any]) -> Architecture:
    """The architecture with the scales that a model had before it was exported; it has no biases either way."""
    return dataclasses.replace(ours, embedding_scale=form["embedding_scale"], attention_scale=form["attention_scale"])
