"""Hash Layers: a fixed table, not a learned router, says which expert a token passes.

Roller et al. 2021, "Hash Layers For Large Sparse Models" (arXiv:2106.04426). A decoder whose feed-forward in one layer
in the middle is a bank of experts; the token's id alone chooses, by a table that is made before training from how often
each token occurs, so that experts are equally busy. No gate, no weight, no balance loss.

    moekit run hash_layers                  # minutes on a laptop, nothing to download
    moekit run hash_layers --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from moekit import routers
from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.experts import MultiHashMLP
from moekit.layer import MoELayer
from moekit.recipes._networks import (
    TEXT,
    DecoderConfig,
    dense_twin_layer,
    expert_bank,
    feed_forward,
    knowing,
    parts,
    with_twins,
)
from moekit.recipes._routers import LEARNED, Learned
from moekit.routing import Router
from moekit.runs import ModelParts, Recipe, Run, RunConfig, RunText, Variant
from moekit.runs.settings import DataConfig, LanguageModelTasks, TaskConfig, TrainConfig, setting
from moekit.training.checkpoint_state import load_state
from moekit.transformer import Side, every_other

Hash = Literal["balanced", "random", "previous", "bigram", "position", "clustered", "dispersed", "oracle"]

POSITIONS = 4096  # of the position hash: room to write beyond the longest sentence


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderConfig):
    """The network.

    Attributes:
        router: what chooses the expert: table (the paper), or for comparison a learned router of one expert per token:
            switch (softmax), sampled (drawn in training from the softmax), cosine, base (balanced assignment) or
            loss_free (balanced by a bias). Those of a softmax want model.load_balance 0.01.
        hash: key that selects the expert: the token, by a balanced or a random table; the previous token; the bigram;
            the position; a cluster of similar tokens (clustered), or similar tokens spread over different experts
            (dispersed); the next token (oracle, which cannot generate: set evaluate.samples to 0).
        tables: number of hash tables: above 1 = MultiHash, which splits the hidden layer into so many segments, each
            with its own balanced table.
        hash_seed: random seed of the hash table.
        embeddings: run folder of a trained model with the same tokenizer, whose token embeddings clustered and
            dispersed use.
        layer: index of the first expert layer, from 0; the middle of the network is usual.
        every: spacing of further expert layers, in layers; 100 = a single expert layer.
    """

    router: Literal["table", Learned] = "table"
    hash: Hash = "balanced"
    tables: int = setting(1, at_least=1)
    hash_seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    embeddings: str | None = None
    layer: int = setting(2, at_least=0)
    every: int = setting(100, at_least=1)  # one layer in all
    load_balance: float = 0.0  # a table has no losses


def hash_router(model: ModelConfig, text: RunText) -> routers.HashRouter:
    """The router of a hash layer.

    Args:
        model: says what chooses the expert; the oracle may stand in a decoder.
        text: whose training part is counted as the model will see it. Without it the table has the same shape, and
            knows neither text nor embeddings.

    Raises:
        UserError: if several tables are asked of another kind, or the embeddings are not there or do not fit.
    """
    experts, seed = model.num_experts, model.hash_seed
    if model.tables > 1 and model.hash != "balanced":
        raise UserError(f"model.tables above 1 needs model.hash balanced: got {model.tables} and {model.hash}.")
    match model.hash:
        case "balanced" if model.tables > 1:
            return routers.multi_hash(experts, text.token_counts(), num_tables=model.tables, seed=seed)
        case "balanced":
            return routers.hash_layers(experts, text.token_counts(), seed=seed)
        case "random":
            return routers.hash_random(experts, text.vocab_size, seed=seed)
        case "previous":
            return routers.hash_previous(experts, text.token_counts(), seed=seed)
        case "bigram":
            key = routers.Bigram(text.vocab_size, seed=seed)
            return routers.hash_bigram(experts, key, counts=text.bigram_counts(key), seed=seed)
        case "position":
            return routers.hash_position(experts, POSITIONS, seed=seed)
        case "clustered" | "dispersed" if text.data is None:
            return routers.hash_random(experts, text.vocab_size, seed=seed)
        case "clustered":
            return routers.hash_clustered(experts, token_embeddings(model.embeddings, text.vocab_size), seed=seed)
        case "dispersed":
            return routers.hash_dispersed(experts, token_embeddings(model.embeddings, text.vocab_size), seed=seed)
        case "oracle":
            return routers.hash_oracle(experts, text.token_counts(shifted=True), seed=seed, allow_future=True)


def token_embeddings(run: str | None, vocab_size: int) -> Tensor:
    """Float[V, D], the token embeddings of the best checkpoint of a run.

    Raises:
        UserError: there is none, or it has another vocabulary.
    """
    checkpoint = None if run is None else Run.open(run).best_checkpoint
    if checkpoint is None:
        raise UserError(
            f"model.hash clustered and dispersed need model.embeddings, the folder of a trained run: got {run}. For "
            "example train --variant tiny_dense and give its folder."
        )
    table = load_state(checkpoint).weights.get("backbone.embedding.weight")
    if table is None or table.shape[0] != vocab_size:
        found = "no token embeddings" if table is None else f"a vocabulary of {table.shape[0]}"
        raise UserError(f"model.embeddings must be of a run with this one's vocabulary of {vocab_size}: got {found}.")
    return table


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model
    if model.router != "table" and (model.hash != "balanced" or model.tables > 1):
        raise UserError(
            f"model.router {model.router} has no table: leave model.hash and model.tables out, or set model.router to "
            "table."
        )
    if model.num_experts and model.hash == "oracle" and config.evaluate.samples:
        raise UserError("an oracle cannot write, for it asks for the next token: set evaluate.samples to 0.")

    def experts(layer: int, side: Side) -> MoELayer:
        router: Router
        if model.router == "table":
            router = hash_router(model, text)
        else:
            router = LEARNED[model.router](model.dim, model.num_experts)
        if model.tables == 1:
            return MoELayer(router, expert_bank(model))
        options: Any = {"activation": model.activation, "dropout": model.dropout, "init_scale": model.expert_init_scale}
        segments = MultiHashMLP(model.num_experts, model.dim, model.hidden_dim, num_segments=model.tables, **options)
        return MoELayer(router, segments)

    sparse = experts if model.num_experts else dense_twin_layer(model)
    layers = every_other(sparse, lambda layer, side: feed_forward(model), start=model.layer, every=model.every)
    return parts(config, text, layers)


TINY = TEXT.tiny.changed(model=ModelConfig(num_experts=16), train={"max_steps": 900})
SMALL = TEXT.small.changed(
    model=ModelConfig(dim=192, heads=6, layers=6, hidden_dim=768, num_experts=32, layer=3, dropout=0.05),
)


def paper(num_experts: int) -> RunConfig:
    """A model of pushshift.io Reddit: width 1,024, experts in layer 7 (from 0), a vocabulary of 8,000 pieces.

    Source: sizes arXiv:2106.04426; the layer is the default of the authors' code; depth and hidden size are ours, those
    that make both published counts and the published 17 % active of the larger one; the training is ours.
    """
    return RunConfig(
        data=DataConfig(source="text", vocab_size=8000, max_length=1024),
        model=ModelConfig(
            dim=1024, heads=16, hidden_dim=4096, layers=17, num_experts=num_experts, layer=7, dropout=0.1
        ),
        tasks=LanguageModelTasks(causal_lm=TaskConfig(tokens=2**18)),
        train=TrainConfig(max_steps=500_000, learning_rate=5e-4, warmup_steps=10_000, label_smoothing=0.0),
    )


RECIPE = Recipe(
    name="hash_layers",
    about="Hash Layers of Roller et al. (arXiv:2106.04426): a fixed table maps tokens to experts, no learned router.",
    build=build,
    reads_text=True,
    variants={
        # Test, one seed: 2.339 nats, its dense twin 2.360 (recipes/hash_layers/results).
        **with_twins(tiny=TINY, facts=knowing(TINY)),
        "tiny_random": Variant(TINY.changed(model={"hash": "random"}), "a random table instead of a balanced one"),
        "tiny_previous": Variant(TINY.changed(model={"hash": "previous"}), "the previous token selects the expert"),
        "tiny_bigram": Variant(
            TINY.changed(model={"hash": "bigram"}), "the previous and the current token select the expert"
        ),
        "tiny_position": Variant(TINY.changed(model={"hash": "position"}), "the position selects the expert"),
        "tiny_oracle": Variant(
            TINY.changed(model={"hash": "oracle"}, evaluate={"samples": 0}), "the next token selects, which is cheating"
        ),
        "tiny_multi": Variant(TINY.changed(model={"tables": 4}), "MultiHash: four segments, each with its own table"),
        **with_twins(small=SMALL),
        "paper_1x64": Variant(paper(64), "one layer of 64 experts: 751 million parameters"),
        "paper_1x128": Variant(paper(128), "one layer of 128 experts: 1.28 billion"),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
