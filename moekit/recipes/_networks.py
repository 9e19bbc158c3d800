"""What recipes share: a transformer by its sizes, its dense twin, and settings to begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from moekit.experts import Experts, GroupedGLU, GroupedMLP
from moekit.layer import AuxLosses
from moekit.runs import ModelParts, RunConfig, RunText, Variant
from moekit.runs.settings import (
    SURGERY,
    DataConfig,
    EvaluateConfig,
    LanguageModelTasks,
    SpanCorruptionTasks,
    TrainConfig,
    TranslationTasks,
    active_tasks,
    setting,
)
from moekit.tasks import make_heads
from moekit.transformer import (
    GLU,
    MLP,
    DecoderOnly,
    EncoderDecoder,
    FeedForwardFactory,
    LayerNorm,
    Positions,
    RelativePositions,
    RMSNorm,
    RMSNormWithoutScale,
    RotaryPositions,
    Side,
    SinusoidalPositions,
    every_other,
)
from moekit.transformer.stack import StackOptions

Norm = Literal["layer", "rms", "rms_without_scale"]
NORMS: Mapping[Norm, Callable[[int], nn.Module]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "rms_without_scale": RMSNormWithoutScale,
}

Sparse = Callable[[int, Side], nn.Module]
"""Makes the sparse feed-forward of a layer."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Presets that every recipe's network has.

    Attributes:
        dim: model dimension: the width of the residual stream.
        heads: number of attention heads.
        head_dim: channels of an attention head; 0 = dim / heads.
        hidden_dim: hidden size of a feed-forward layer, and of each expert; four times dim is usual.
        num_experts: number of experts in each sparse layer; 0 = no experts: the dense twin with equal FLOPs per token.
        every: spacing of the sparse layers: the last of every so many layers is sparse; 1 = all layers, 2 is usual.
        load_balance: weight of the load-balancing loss, summed over layers; 0.01 is usual, 0 = none.
        router_z: weight of the router z-loss, which keeps router logits small; 0.001 is usual, 0 = none.
        dropout: dropout probability on embeddings, residual branches and hidden activations; 0 to 0.1 is usual.
        activation: activation function of feed-forward layers and experts.
        gated: whether feed-forward layers and experts are gated linear units (GEGLU with gelu, SwiGLU with silu).
        norm: normalisation: layer (LayerNorm), rms (RMSNorm) or rms_without_scale (RMSNorm without weights).
        positions: position encoding: sinusoidal, rotary, or relative (T5).
        tied: whether input embeddings and output layer share their weights.
        init_scale: variance scale of the initial weights of attention and dense feed-forward layers; 1 is the default,
            0.1 in Switch.
        expert_init_scale: variance scale of the initial weights of experts; 1 is the default, 0.1 in Switch.
        init_by_depth: whether matrices that write to the residual stream, in experts too, are initialised smaller by
            the square root of the number of residual branches, as in GPT-2; off in Switch.
        checkpoint: whether activations are recomputed in the backward pass instead of kept (activation checkpointing),
            which saves memory and costs time.
    """

    dim: int = setting(128, at_least=1)
    heads: int = setting(4, at_least=1)
    head_dim: int = setting(0, at_least=0)
    hidden_dim: int = setting(512, at_least=1)
    num_experts: int = setting(8, at_least=0, free=SURGERY)
    every: int = setting(2, at_least=1)
    load_balance: float = setting(1e-2, at_least=0, free=SURGERY)
    router_z: float = setting(0.0, at_least=0, free=SURGERY)
    dropout: float = setting(0.0, at_least=0, below=1, free=SURGERY)
    activation: Literal["relu", "gelu", "silu"] = "relu"
    gated: bool = False
    norm: Norm = "layer"
    positions: Literal["sinusoidal", "rotary", "relative"] = "sinusoidal"
    tied: bool = True
    init_scale: float = setting(1.0, above=0, free=SURGERY)
    expert_init_scale: float = setting(1.0, above=0, free=SURGERY)
    init_by_depth: bool = setting(True, free=SURGERY)
    checkpoint: bool = setting(False, free=SURGERY)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(NetworkConfig):
    """A decoder-only language model.

    Attributes:
        layers: number of transformer blocks.
    """

    layers: int = setting(4, at_least=1)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(NetworkConfig):
    """A sequence-to-sequence model.

    Attributes:
        encoder_layers: number of transformer blocks in the encoder.
        decoder_layers: number of transformer blocks in the decoder.
    """

    encoder_layers: int = setting(2, at_least=1)
    decoder_layers: int = setting(2, at_least=1)


def feed_forward(model: NetworkConfig, hidden_dim: int | None = None) -> nn.Module:
    """A dense feed-forward of the network's kind."""
    kind = GLU if model.gated else MLP
    width = model.hidden_dim if hidden_dim is None else hidden_dim
    return kind(model.dim, width, activation=model.activation, dropout=model.dropout)


def expert_bank(model: NetworkConfig, num_experts: int | None = None, **options: Any) -> Experts:
    """Experts of the network's kind, by default as many as it says; `options` are the bank's own."""
    kind: Any = GroupedGLU if model.gated else GroupedMLP
    bank: Experts = kind(
        model.num_experts if num_experts is None else num_experts,
        model.dim,
        model.hidden_dim,
        activation=model.activation,
        dropout=model.dropout,
        init_scale=model.expert_init_scale,
        **options,
    )
    return bank


def dense_twin_layer(model: NetworkConfig, active: float = 1.0) -> Sparse:
    """Makes dense feed-forwards as wide as the `active` experts that a token passes in a sparse layer."""
    return lambda layer, side: feed_forward(model, round(active * model.hidden_dim))


def feed_forwards(model: NetworkConfig, sparse: Sparse, active: float = 1.0) -> FeedForwardFactory:
    """`sparse` at every n-th layer, dense ones elsewhere; in the dense twin, of equal cost per token everywhere.

    Args:
        model: the sizes.
        sparse: makes a sparse layer.
        active: experts that a token passes in a sparse layer: how wide the twin is there, in hidden sizes.
    """
    chosen = sparse if model.num_experts else dense_twin_layer(model, active)
    return every_other(chosen, lambda layer, side: feed_forward(model), start=model.every - 1, every=model.every)


def decoder(model: DecoderConfig, vocab_size: int, layers: FeedForwardFactory) -> DecoderOnly:
    """The language model with the given feed-forwards."""
    return DecoderOnly(
        vocab_size, model.dim, model.heads, model.layers, model.hidden_dim, tied=model.tied, **_options(model, layers)
    )


def encoder_decoder(model: EncoderDecoderConfig, vocab_size: int, layers: FeedForwardFactory) -> EncoderDecoder:
    """The sequence-to-sequence model with the given feed-forwards."""
    return EncoderDecoder(
        vocab_size,
        model.dim,
        model.heads,
        model.encoder_layers,
        model.decoder_layers,
        model.hidden_dim,
        tied=model.tied,
        **_options(model, layers),
    )


def _options(model: NetworkConfig, layers: FeedForwardFactory) -> StackOptions:
    return StackOptions(
        feed_forward=layers,
        positions=_positions(model),
        norm=NORMS[model.norm],
        activation=model.activation,
        dropout=model.dropout,
        head_dim=model.head_dim or None,
        checkpoint=model.checkpoint,
        init_scale=model.init_scale,
        init_by_depth=model.init_by_depth,
    )


def _positions(model: NetworkConfig) -> Positions:
    match model.positions:
        case "sinusoidal":
            return SinusoidalPositions()
        case "rotary":
            return RotaryPositions()
        case "relative":
            return RelativePositions(model.heads)


def aux_losses(model: NetworkConfig, *, of_zero: bool = False) -> AuxLosses | None:
    """The network's weights of the routers' losses; None if none is left, and of a dense model.

    Args:
        model: the weights.
        of_zero: whether losses of weight 0 are left in, so that they are seen in the metrics.
    """
    wanted = {"load_balance": model.load_balance, "router_z": model.router_z}
    wanted = {name: weight for name, weight in wanted.items() if weight or of_zero}
    return AuxLosses(layers="sum", **wanted) if wanted and model.num_experts else None


def parts(config: RunConfig, text: RunText, layers: FeedForwardFactory, *, of_zero: bool = False) -> ModelParts:
    """The network of the configuration with the given feed-forwards, and a head for each task; see `aux_losses`."""
    model, make = config.model, decoder if isinstance(config.model, DecoderConfig) else encoder_decoder
    heads = make_heads(active_tasks(config.tasks), model.dim, config.train.label_smoothing)
    return ModelParts(make(model, text.vocab_size, layers), heads, aux_losses(model, of_zero=of_zero))


def dense(config: RunConfig) -> RunConfig:
    """The FLOP-matched dense twin of a recipe's configuration: what a token passes is the same, there is one of it."""
    return config.changed(model={"num_experts": 0})


# -- settings that recipes begin with ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Presets:
    """Settings for one kind of text; the model is to be given.

    Attributes:
        tiny: minutes on two cores, with generated text.
        small: half an hour on a laptop, with text of the user's.
        paper: a published model.
    """

    tiny: RunConfig
    small: RunConfig
    paper: RunConfig

    def changed(self, **groups: Any) -> Presets:
        """`RunConfig.changed`, of all."""
        return Presets(self.tiny.changed(**groups), self.small.changed(**groups), self.paper.changed(**groups))


TEXT = Presets(
    tiny=RunConfig(
        data=DataConfig(vocab_size=1600),
        train=TrainConfig(max_minutes=4.0, label_smoothing=0.0, validate_every=300),
        evaluate=EvaluateConfig(beam_size=1, max_sentences=300),
    ),
    small=RunConfig(
        data=DataConfig(source="text", vocab_size=4000, temperature=5.0),
        train=TrainConfig(max_steps=0, max_minutes=30.0, warmup_steps=400, label_smoothing=0.0, validate_every=500),
        evaluate=EvaluateConfig(beam_size=1),
    ),
    paper=RunConfig(
        data=DataConfig(source="text"),
        train=TrainConfig(label_smoothing=0.0, precision="bf16-mixed"),
        evaluate=EvaluateConfig(beam_size=1),
    ),
).changed(tasks=LanguageModelTasks())
"""A language model."""

SPANS = TEXT.changed(data={"packed": True}, tasks=SpanCorruptionTasks())
"""A T5."""

TRANSLATION = Presets(
    tiny=RunConfig(
        data=DataConfig(vocab_size=1600),
        train=TrainConfig(max_minutes=4.0, validate_every=250),
        evaluate=EvaluateConfig(max_sentences=150, valid_sentences=50),
    ),
    small=RunConfig(
        data=DataConfig(source="moses", vocab_size=4000, temperature=5.0),
        train=TrainConfig(max_steps=0, max_minutes=30.0, warmup_steps=400, validate_every=500),
        evaluate=EvaluateConfig(valid_sentences=50),
    ),
    paper=RunConfig(data=DataConfig(source="moses", temperature=5.0)),
).changed(tasks=TranslationTasks())
"""Generated languages, or parallel text of the user's."""

T5_ADAFACTOR: Mapping[str, Any] = {
    "optimizer": "adafactor", "learning_rate": 1e-2, "weight_decay": 0.0, "clip": 0.0,
    "warmup_steps": 10_000, "schedule": "inverse_square_root",
}  # fmt: skip
"""Training by Adafactor at T5's rate."""


def knowing(tiny: RunConfig, **model: Any) -> RunConfig:
    """A recipe's tiny variant on text that knows things: narrow, and told of more than a dense model of its cost holds.

    Args:
        tiny: on babel, where there is nothing to know.
        model: sizes that differ.
    """
    facts: dict[str, Any] = {"facts_entities": 600, "facts_relations": 12, "facts_profiles": 0.9}
    sizes: dict[str, Any] = {"dim": 64, "hidden_dim": 128, "num_experts": 16}
    train: dict[str, Any] = {"max_steps": 2000, "learning_rate": 8e-3, "validate_every": 500}
    if isinstance(tiny.tasks, SpanCorruptionTasks):
        # Random spans ask for one value in eight, and most of what they ask for is grammar; so values are what is cut
        # out. Which gap asks for which value is to be learnt first; sentences with one gap teach that, profiles do not.
        # That takes the longest here: a model of width 64 is not full when training ends, with experts or without.
        facts = {"facts_entities": 200, "facts_relations": 8, "facts_profiles": 0.5, "max_length": 32,
                 "salient": "source", "packed": False}  # fmt: skip
        train |= {"max_steps": 4000, "warmup_steps": 200}
        sizes |= {"dim": 32, "hidden_dim": 64}
    return tiny.changed(
        data={
            "source": "facts", "babel_languages": 2, "babel_sentences": 100_000, "facts_power": 0.5, "vocab_size": 700,
            "byte_fallback": False, **facts,
        },
        model={**sizes, **model},
        tasks={task: {"tokens": 2048} for task in active_tasks(tiny.tasks)},
        train={"max_minutes": 10.0, **train},
    )  # fmt: skip


def with_lexicon(tiny: RunConfig, **model: Any) -> RunConfig:
    """A translation recipe's tiny variant on languages of many words: narrow, with more to learn than it holds.

    Args:
        tiny: on languages of some two hundred words, which are soon known.
        model: sizes that differ.
    """
    return tiny.changed(
        data={
            "babel_languages": 2, "babel_sentences": 60_000, "babel_sizes": None, "babel_concepts": 1000,
            # Most words are of several pieces. Of words that are one piece the vectors of the vocabulary hold most,
            # and a dense model comes near the sparse one.
            "babel_cognates": 0.0, "directions": None, "vocab_size": 400, "byte_fallback": False,
        },
        model={"dim": 64, "hidden_dim": 128, "num_experts": 16, **model},
        train={"max_steps": 2000, "max_minutes": 10.0, "learning_rate": 4e-3, "validate_every": 500},
        evaluate={"words": 20},
    )  # fmt: skip


_NOTES = {
    "tiny": "minutes on two cores, on generated languages, nothing to download (default)",
    "facts": "minutes on two cores, on facts in generated languages: narrow, with many experts",
    "lexicon": "minutes on two cores, on generated languages of a thousand words: narrow, with many experts",
    "small": "half an hour on a laptop, on your own text: give --data.source and --data.path",
}


def with_twins(**configs: RunConfig) -> dict[str, Variant]:
    """The variants tiny, facts, lexicon and small as far as given, each followed by its dense twin ``NAME_dense``."""
    variants = {}
    for name, config in configs.items():
        variants[name] = Variant(config, _NOTES[name])
        variants[f"{name}_dense"] = Variant(dense(config), "its dense twin, without experts: equal cost per token")
    return variants
