"""The families of transformers that moekit exchanges models with: an entry for each, by which folders are read and
written, and models are described and built. Another family is another entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moekit.errors import UserError
from moekit.huggingface.architecture import NAMES, Architecture, Kind
from moekit.huggingface.keys import KeyMap, Link
from moekit.huggingface.settings import Fields, Setting
from moekit.transformer import LayerNorm, RelativePositions, RMSNorm, Side, SplitSinusoidalPositions
from moekit.transformer.embedding import EmbeddingScale


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is particular to one ``model_type``.

    Attributes:
        kind: The ``model_type``.
        norm: Our norm.
        norm_eps: Its epsilon, where that is no setting there.
        positions: Our positions.
        position_settings: Their arguments, each with the attribute of `Architecture` that it is.
        k: The number of experts per token.
        bias: Whether attention and feed-forwards have biases.
        attention_scale: How attention is scaled; see `Architecture`.
        embedding_scale: How theirs scale embeddings, by our architecture.
        settings: The fields of ``config.json``, in the order in which they are written.
        sparse: The numbers of sparse layers, from their step and the number of layers.
        sparse_rule: The same in words, for messages.
        check: Adds to the attributes that were read those that no one field says.
        keys: The names of tensors.
        token_defaults: Special ids where a folder does not say them.
    """

    kind: Kind
    norm: type[LayerNorm] | type[RMSNorm]
    norm_eps: float | None = None
    positions: type[RelativePositions] | type[SplitSinusoidalPositions]
    position_settings: Mapping[str, str]
    k: int
    bias: bool
    attention_scale: float | None
    embedding_scale: Callable[[Architecture], EmbeddingScale]
    settings: tuple[Setting, ...]
    sparse: Callable[[int, int], tuple[int, ...]]
    sparse_rule: str
    check: Callable[[Fields, dict[str, Any], bool], None] = lambda fields, found, dropless: None
    keys: KeyMap
    token_defaults: Mapping[str, int]

    def architecture(self, config: Mapping[str, Any], where: str, *, dropless: bool) -> Architecture:
        """The architecture that a ``config.json`` describes, with their scales.

        Args:
            config: The content of the file.
            where: The file, which begins messages.
            dropless: Whether to leave the capacity out.

        Raises:
            UserError: if a field is wrong, or is of something that moekit does not compute.
        """
        fields = Fields(config, where)
        found: dict[str, Any] = {"kind": self.kind, "bias": self.bias, "norm_eps": self.norm_eps}
        if self.norm_eps is None:
            del found["norm_eps"]
        for setting in self.settings:
            setting.read(fields, found)
        for side in ("encoder", "decoder"):
            found[f"{side}_sparse"] = self.sparse(found.pop(f"{side}_step"), found[f"{side}_layers"])
        self.check(fields, found, dropless)
        if dropless:
            found["limit"] = None
        return self.in_their_form(Architecture(**found))

    def says(self, attribute: str) -> bool:
        """Whether ``config.json`` has a field of its own for an attribute of `Architecture`."""
        return any(setting.attributes[:1] == (attribute,) for setting in self.settings)

    def in_their_form(self, ours: Architecture) -> Architecture:
        """The architecture with the scales of transformers."""
        scale = self.embedding_scale(ours)
        return dataclasses.replace(ours, embedding_scale=scale, attention_scale=self.attention_scale)

    def config(self, ours: Architecture) -> dict[str, Any]:
        """The fields of ``config.json``.

        Raises:
            UserError: if the sparse layers are not where the family can have them, or norms have another epsilon.
        """
        if self.norm_eps is not None and ours.norm_eps != self.norm_eps:
            raise UserError(
                f"transformers' {NAMES[self.kind]} has norms with epsilon {self.norm_eps:g}: this model has "
                f"{ours.norm_eps:g}."
            )
        values = dict(vars(self.in_their_form(ours)))
        for side in ours.layers:
            values[f"{side}_step"] = self._step(ours, side)
        return {setting.name: setting.written(values) for setting in self.settings}

    def links(self, ours: Architecture, state: Mapping[str, Tensor]) -> Iterator[Link]:
        """A link for every tensor of theirs, from our tensors by name; see `KeyMap.links`."""
        return self.keys.links(ours, self.in_their_form(ours), state)

    def _step(self, ours: Architecture, side: Side) -> int:
        layers, sparse = ours.layers[side], ours.sparse[side]
        for step in range(layers + 2):
            if self.sparse(step, layers) == sparse:
                return step
        raise UserError(
            f"transformers' {NAMES[self.kind]} has {self.sparse_rule}: the {side} of this model has layers "
            f"{', '.join(map(str, sparse))} of {layers}."
        )


_ACTIVATIONS = {
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu",
}  # fmt: skip
_NOT_GATED = (
    " moekit has gelu in its tanh form only, and transformers' own sparse layers cannot run the gated ones."
)  # fmt: skip
_ROUTERS = (
    Setting("router_bias", False, hint=" Routers of moekit have no bias."),
    Setting("router_dtype", "float32", hint=" Routers of moekit compute in float32."),
)


def _switch_step(side: Side) -> tuple[Setting, Setting]:
    """The number of sparse layers, and the step between them, which is derived from it unless the file says it."""

    def step(fields: Fields, found: Mapping[str, Any]) -> int:
        layers, sparse = found[f"{side}_layers"], number.value(fields)
        return layers // sparse if sparse else layers

    def count(ours: Mapping[str, Any]) -> int:
        """A number from which their rule derives the step, or 0 where only the step itself can say it."""
        step, layers = ours[f"{side}_step"], ours[f"{side}_layers"]
        return next((n for n in range(1, layers + 2) if layers // n == step), 0)

    number = Setting(f"num_sparse_{side}_layers", 3, least=0, write=count)
    return number, Setting(f"{side}_sparse_step", step, f"{side}_step", least=0)


_ENCODER, _DECODER = _switch_step("encoder"), _switch_step("decoder")
SWITCH = Family(
    kind="switch_transformers",
    norm=RMSNorm,
    positions=RelativePositions,
    position_settings={"num_buckets": "num_buckets", "max_distance": "max_distance"},
    k=1,
    bias=False,
    attention_scale=1.0,
    # Theirs divides hidden states by sqrt(D) where one table is both, and else nothing.
    embedding_scale=lambda ours: "output" if ours.tied else "none",
    settings=(
        Setting("vocab_size", 32128, "vocab_size"),
        Setting("tie_word_embeddings", True, "tied"),
        Setting("d_model", 768, "dim"),
        Setting("d_kv", 64, "head_dim"),
        Setting("d_ff", 2048, ("encoder_hidden_dim", "decoder_hidden_dim")),
        Setting("num_layers", 12, "encoder_layers"),
        Setting("num_decoder_layers", lambda fields, found: found["encoder_layers"], "decoder_layers"),
        Setting("num_heads", 12, "heads"),
        Setting("num_experts", 8, "num_experts"),
        _ENCODER[0],
        _DECODER[0],
        _ENCODER[1],
        _DECODER[1],
        # More than a sequence has tokens: dropless.
        Setting("expert_capacity", 64, "limit", none=2**31 - 1),
        *_ROUTERS,
        Setting("router_jitter_noise", 0.01, "jitter"),
        Setting("relative_attention_num_buckets", 32, "num_buckets"),
        Setting("relative_attention_max_distance", 128, "max_distance"),
        Setting("dropout_rate", 0.1, ("dropout", "attention_dropout", "hidden_dropout", "final_dropout")),
        Setting("layer_norm_epsilon", 1e-6, "norm_eps"),
        Setting("dense_act_fn", "relu", "activation", values=_ACTIVATIONS, hint=_NOT_GATED),
    ),
    sparse=lambda step, layers: tuple(i for i in range(layers) if step and (step == 1 or i % step == 1)),
    sparse_rule="the second of every n layers sparse (1, 1 + n, ...), or all, or none",
    keys=KeyMap(
        of_side={
            "{side}.positions.weight": "{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "{side}.norm.weight": "{side}.final_layer_norm.weight",
        },
        of_layer={
            "self_attention.qkv.weight": "0.SelfAttention.{q,k,v}.weight",
            "self_attention.out.weight": "0.SelfAttention.o.weight",
            "self_attention_norm.weight": "0.layer_norm.weight",
            "cross_attention.q.weight": "1.EncDecAttention.q.weight",
            "cross_attention.kv.weight": "1.EncDecAttention.{k,v}.weight",
            "cross_attention.out.weight": "1.EncDecAttention.o.weight",
            "cross_attention_norm.weight": "1.layer_norm.weight",
            "feed_forward_norm.weight": "{1|2}.layer_norm.weight",
            "feed_forward.w_in.weight": "{1|2}.mlp.wi.weight",
            "feed_forward.w_out.weight": "{1|2}.mlp.wo.weight",
            "feed_forward.router.weight": "{1|2}.mlp.router.classifier.weight",
            "feed_forward.experts.w_in": "{1|2}.mlp.experts.expert_{e}.wi.weight",
            "feed_forward.experts.w_out": "{1|2}.mlp.experts.expert_{e}.wo.weight",
        },
        layer="{side}.block.{i}.layer.",
    ),
    token_defaults={"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1},
)


def _check_nllb(fields: Fields, found: dict[str, Any], dropless: bool) -> None:
    dim, heads, fraction = found["dim"], found["heads"], fields.given.get("moe_eval_capacity_token_fraction", 1.0)
    if dim % heads:
        raise UserError(f"{fields.where}: d_model must be divisible by encoder_attention_heads: got {dim} and {heads}.")
    drops = not isinstance(fraction, int | float) or fraction < 1
    if (found["encoder_sparse"] or found["decoder_sparse"]) and drops and not dropless:
        raise UserError(
            f"{fields.where}: moe_eval_capacity_token_fraction must be 1, which drops nothing: got {fraction!r}, by "
            "which the result for a sentence depends on what it is batched with. Import it dropless."
        )
    found["head_dim"] = dim // heads
    found["first_position"] = Setting("pad_token_id", 1, least=0).value(fields) + 1


NLLB = Family(
    kind="nllb-moe",
    norm=LayerNorm,
    norm_eps=1e-5,
    positions=SplitSinusoidalPositions,
    position_settings={"first": "first_position"},
    k=2,
    bias=True,
    attention_scale=None,
    # Theirs multiplies by sqrt(D) on the way in, or does nothing; ours on the way out becomes the first.
    embedding_scale=lambda ours: "none" if ours.embedding_scale == "none" else "input",
    settings=(
        Setting("vocab_size", 128112, "vocab_size"),
        Setting("tie_word_embeddings", True, "tied"),
        Setting("d_model", 1024, "dim"),
        Setting("encoder_layers", 12, "encoder_layers"),
        Setting("decoder_layers", 12, "decoder_layers"),
        Setting("encoder_ffn_dim", 4096, "encoder_hidden_dim"),
        Setting("decoder_ffn_dim", 4096, "decoder_hidden_dim"),
        Setting("encoder_attention_heads", 16, "heads"),
        Setting("decoder_attention_heads", 16, "heads", hint=" Encoder and decoder must have as many heads."),
        Setting("encoder_sparse_step", 4, "encoder_step", least=0),
        Setting("decoder_sparse_step", 4, "decoder_step", least=0),
        Setting("encoder_layerdrop", 0.0),
        Setting("decoder_layerdrop", 0.0),
        Setting("num_experts", 128, "num_experts"),
        Setting("activation_function", "relu", "activation", values=_ACTIVATIONS, hint=_NOT_GATED),
        Setting("scale_embedding", True, "embedding_scale", values={True: "input", False: "none"}),
        *_ROUTERS,
        Setting("second_expert_policy", "all", "second_expert", values={p: p for p in ("all", "sampling", "random")}),
        Setting(
            "normalize_router_prob_before_dropping",
            False,
            "renormalise",
            values={True: "before_drop", False: "after_drop"},
        ),
        Setting("batch_prioritized_routing", False),
        Setting("moe_eval_capacity_token_fraction", 1.0),
        Setting("moe_token_dropout", 0.2, "output_masking"),
        Setting("dropout", 0.1, "dropout"),
        Setting("attention_dropout", 0.1, "attention_dropout"),
        Setting("activation_dropout", 0.0, "hidden_dropout"),
    ),
    sparse=lambda step, layers: tuple(i for i in range(layers) if step and (i + 1) % step == 0),
    sparse_rule="the last of every n layers sparse, or none",
    check=_check_nllb,
    keys=KeyMap(
        of_side={"{side}.norm.{p}": "model.{side}.layer_norm.{p}"},
        of_layer={
            "self_attention.qkv.{p}": "self_attn.{q,k,v}_proj.{p}",
            "self_attention.out.{p}": "self_attn.out_proj.{p}",
            "self_attention_norm.{p}": "self_attn_layer_norm.{p}",
            "cross_attention.q.{p}": "cross_attention.q_proj.{p}",
            "cross_attention.kv.{p}": "cross_attention.{k,v}_proj.{p}",
            "cross_attention.out.{p}": "cross_attention.out_proj.{p}",
            "cross_attention_norm.{p}": "cross_attention_layer_norm.{p}",
            "feed_forward_norm.{p}": "ff_layer_norm.{p}",
            "feed_forward.w_in.{p}": "ffn.fc1.{p}",
            "feed_forward.w_out.{p}": "ffn.fc2.{p}",
            "feed_forward.router.weight": "ffn.router.classifier.weight",
            "feed_forward.experts.w_in": "ffn.experts.expert_{e}.fc1.weight",
            "feed_forward.experts.b_in": "ffn.experts.expert_{e}.fc1.bias",
            "feed_forward.experts.w_out": "ffn.experts.expert_{e}.fc2.weight",
            "feed_forward.experts.b_out": "ffn.experts.expert_{e}.fc2.bias",
        },
        layer="model.{side}.layers.{i}.",
        prefix="model.",
    ),
    token_defaults={"pad_token_id": 1, "decoder_start_token_id": 2, "eos_token_id": 2},
)

FAMILIES: Mapping[Kind, Family] = {family.kind: family for family in (SWITCH, NLLB)}
"""Families by ``model_type``."""
