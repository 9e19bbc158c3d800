"""Hash Layers: a fixed table, not a learned router, says which expert a token passes.

Roller et al. 2021, "Hash Layers For Large Sparse Models" (arXiv:2106.04426). A decoder whose feed-forward in one layer
in the middle is a bank of experts; the token's id alone chooses, by a table that is made before training from how often
each token occurs, so that experts are equally busy. No gate, no weight, no balance loss.

    python -m moekit.recipes.hash_layers                  # minutes on a laptop, nothing to download
    python -m moekit.recipes.hash_layers run --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.experts import MultiHashMLP
from moekit.heads import CausalLMHead
from moekit.layer import MoELayer
from moekit.recipes._command import Recipe, main
from moekit.recipes._config import DataConfig, EvaluateConfig, LanguageModelTasks, RecipeConfig, TaskConfig, TrainConfig
from moekit.recipes._hash_tables import Hash, hash_router
from moekit.recipes._networks import (
    TWIN_NOTES,
    DecoderConfig,
    aux_losses,
    decoder,
    dense_twin_layer,
    expert_bank,
    feed_forward,
    with_twins,
)
from moekit.recipes._parts import Built, WithData
from moekit.recipes._pipeline import commands
from moekit.transformer import Side, every_other


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderConfig):
    """The network.

    Attributes:
        hash: what chooses the expert: the token, by a balanced or a random table; the previous token; the bigram; the
            position; a cluster of similar tokens, or each of them to another expert (dispersed); the next token
            (oracle, which cannot write: set evaluate.samples to 0).
        tables: more than 1 = MultiHash: so many segments of the hidden layer, each with a balanced table of its own.
        hash_seed: of the table.
        embeddings: run folder of a model with the same tokenizer, for clustered and dispersed.
        layer: of the experts, from 0.
        every: so many layers after it stands another layer of experts.
    """

    hash: Hash = "balanced"
    tables: int = 1
    hash_seed: int = 0
    embeddings: str | None = None
    layer: int = 2
    every: int = 100  # one layer in all
    load_balance: float = 0.0  # a table has no losses


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Everything a run is made of.

    Attributes:
        model: the network.
        tasks: tokens per step.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    tasks: LanguageModelTasks = field(default_factory=LanguageModelTasks)


def build(config: Config, vocab_size: int, data: MultitaskData | None = None) -> Built:
    """The parts of a run."""
    model = config.model
    if model.num_experts and model.hash == "oracle" and config.evaluate.samples:
        raise UserError("an oracle cannot write, for it asks for the next token: set evaluate.samples to 0.")

    def experts(layer: int, side: Side) -> MoELayer:
        chosen = hash_router(
            model.hash, model.num_experts, vocab_size, data,
            tables=model.tables, seed=model.hash_seed, embeddings=model.embeddings,
        )  # fmt: skip
        if model.tables == 1:
            return MoELayer(chosen, expert_bank(model))
        options: Any = {"activation": model.activation, "dropout": model.dropout, "init_scale": model.expert_init_scale}
        segments = MultiHashMLP(model.num_experts, model.dim, model.hidden_dim, num_segments=model.tables, **options)
        return MoELayer(chosen, segments)

    sparse = experts if model.num_experts else dense_twin_layer(model)
    layers = every_other(sparse, lambda layer, side: feed_forward(model), start=model.layer, every=model.every)
    head = CausalLMHead(label_smoothing=config.train.label_smoothing)
    return Built(decoder(model, vocab_size, layers), [head], aux_losses(model))


TINY = Config(
    data=DataConfig(vocab_size=1600),
    model=ModelConfig(num_experts=16),
    train=TrainConfig(max_steps=900, max_minutes=4.0, label_smoothing=0.0, validate_every=300),
    evaluate=EvaluateConfig(beam_size=1, max_sentences=300),
)
SMALL = Config(
    data=DataConfig(source="text", vocab_size=4000, temperature=5.0),
    model=ModelConfig(dim=192, heads=6, layers=6, hidden_dim=768, num_experts=32, layer=3, dropout=0.05),
    train=TrainConfig(max_steps=0, max_minutes=30.0, warmup_steps=400, label_smoothing=0.0, validate_every=500),
    evaluate=EvaluateConfig(beam_size=1),
)


def kind(**model: Any) -> Config:
    """`TINY` with another hash."""
    return replace(TINY, model=replace(TINY.model, **model))


def paper(num_experts: int) -> Config:
    """A model of pushshift.io Reddit: width 1,024, experts in layer 7 (from 0), a vocabulary of 8,000 pieces.

    Source: sizes arXiv:2106.04426; the layer is the default of the authors' code; depth and hidden size are ours, those
    that make both published counts and the published 17 % active of the larger one; the training is ours.
    """
    return Config(
        data=DataConfig(source="text", vocab_size=8000, max_length=1024),
        model=ModelConfig(
            dim=1024, heads=16, hidden_dim=4096, layers=17, num_experts=num_experts, layer=7, dropout=0.1
        ),
        tasks=LanguageModelTasks(causal_lm=TaskConfig(tokens=2**18)),
        train=TrainConfig(max_steps=500_000, learning_rate=5e-4, warmup_steps=10_000, label_smoothing=0.0),
    )


VARIANTS: Mapping[str, Config] = {
    **with_twins(tiny=TINY),
    "tiny_random": kind(hash="random"),
    "tiny_previous": kind(hash="previous"),
    "tiny_bigram": kind(hash="bigram"),
    "tiny_position": kind(hash="position"),
    "tiny_oracle": replace(kind(hash="oracle"), evaluate=replace(TINY.evaluate, samples=0)),
    "tiny_multi": kind(tables=4),
    **with_twins(small=SMALL),
    "paper_1x64": paper(64),
    "paper_1x128": paper(128),
}

RECIPE = Recipe(
    name="hash_layers",
    about="Hash Layers of Roller et al. (arXiv:2106.04426): a fixed table from token to expert, nothing to learn.",
    variants=VARIANTS,
    notes={
        **TWIN_NOTES,
        "tiny_random": "tokens hashed at random",
        "tiny_previous": "the token before chooses",
        "tiny_bigram": "the token before and the token together choose",
        "tiny_position": "the place in the sentence chooses",
        "tiny_oracle": "the next token chooses, which is cheating",
        "tiny_multi": "MultiHash: four segments, each hashed apart",
        "paper_1x64": "one layer of 64 experts: 751 million parameters",
        "paper_1x128": "one layer of 128 experts: 1.28 billion",
    },
    commands=commands("hash_layers", WithData(build)),
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
