"""MoE language models of Artetxe et al.: top-2 experts in every other layer of a GPT-like decoder.

Artetxe et al. 2021, "Efficient Large Scale Language Modeling with Mixtures of Experts" (arXiv:2112.10684). The model is
a pre-norm decoder; every other feed-forward is replaced by experts of the same size, two of which a token passes, as
in GShard; the balance loss has weight 0.01, summed over layers; the router runs in float32; both experts of a token
are always sent, and an expert takes up to an even share of these assignments: twice as many as tokens by experts.

    moekit run moe_lm                       # minutes on a laptop, nothing to download
    moekit run moe_lm --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from moekit.cli.recipes import main
from moekit.layer import MoELayer
from moekit.recipes._networks import (
    TEXT,
    DecoderConfig,
    expert_bank,
    feed_forward,
    feed_forwards,
    knowing,
    parts,
    with_twins,
)
from moekit.routers import Balance, SampledChoice, TopKRouter
from moekit.routing import Capacity
from moekit.runs import ModelParts, Recipe, RunConfig, RunText, Variant
from moekit.runs.settings import SURGERY, TaskConfig, setting
from moekit.transformer import Side


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderConfig):
    """The network.

    Attributes:
        k: number of experts per token; 2 in the paper.
        capacity_factor: slots of each expert in training as a multiple of an even share of all routed tokens (k per
            token); 1 in the released code, 0 = no limit.
        eval_capacity_factor: slots of each expert in evaluation as a multiple of an even share of all routed tokens (k
            per token); 0 = no limit. The released code gives it as a share f of all tokens, which is f * E / 2 here for
            E experts and k = 2.
        second_expert: how the second expert of a token is chosen: always = the next best, sampled = drawn in training
            from the router probabilities.
        balance_scope: tokens over which the balance loss counts the load: batch, sequence, or global = all processes
            and the batches of an optimizer step so far (see train.accumulate).
        shared: whether a dense feed-forward stands beside the experts, which every token passes.
    """

    k: int = setting(2, at_least=1)
    # fairseq's top-2 gate takes 2 * ceil(S / E) tokens an expert: a factor of 1 for k = 2.
    capacity_factor: float = setting(1.0, at_least=0, free=SURGERY)
    eval_capacity_factor: float = setting(0.0, at_least=0, free=SURGERY)  # ours: dropless
    second_expert: Literal["always", "sampled"] = "always"  # the released command; sampled is its code's default
    balance_scope: Literal["batch", "sequence", "global"] = "batch"
    shared: bool = False


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model

    def sparse(layer: int, side: Side) -> MoELayer:
        router = TopKRouter(
            model.dim,
            model.num_experts,
            k=model.k,
            capacity=Capacity(train=model.capacity_factor or None, eval=model.eval_capacity_factor or None),
            second_expert=SampledChoice() if model.second_expert == "sampled" else None,
            # fairseq's default: what survives of a token's two experts sums to one
            renormalise="after_drop" if model.k > 1 else "none",
            balance=Balance(scope=model.balance_scope),
        )
        return MoELayer(router, expert_bank(model), shared=feed_forward(model) if model.shared else None)

    return parts(config, text, feed_forwards(model, sparse, model.k + model.shared))


TINY = TEXT.tiny.changed(
    model=ModelConfig(activation="gelu"),
    # The paper trains at twice the learning rate of the dense model of its size; here both use ours.
    train={"max_steps": 900},
)
SMALL = TEXT.small.changed(
    model=ModelConfig(dim=192, heads=6, layers=6, hidden_dim=768, activation="gelu", dropout=0.05),
)


def paper(layers: int, dim: int, heads: int, *, learning_rate: float, batch: int) -> RunConfig:
    """A published model: 512 experts in every other layer, hidden size 4 D, 2,048 tokens a sequence, 300 B tokens.

    Source: arXiv:2112.10684 table 1 and its released configurations for the shapes; dropout, betas, no clipping and the
        balance loss of the released training command. Learning rate, tokens a step (`batch`) and 375 M tokens of
        warm-up are GPT-3's for the dense model of that size, from memory.
    """
    return TEXT.paper.changed(
        data={"vocab_size": 50_260, "max_length": 2048},
        model=ModelConfig(
            layers=layers, dim=dim, heads=heads, hidden_dim=4 * dim, num_experts=512, activation="gelu", dropout=0.1,
            checkpoint=True,
        ),
        tasks={"causal_lm": TaskConfig(tokens=batch)},
        train={
            "max_steps": round(300e9 / batch), "learning_rate": learning_rate, "warmup_steps": round(375e6 / batch),
            "clip": 0.0,
        },
    )  # fmt: skip


RECIPE = Recipe(
    name="moe_lm",
    about="MoE language models of Artetxe et al. (arXiv:2112.10684): top-2 experts in every other layer of a decoder.",
    build=build,
    variants={
        # Test, one seed: 2.327 nats, its dense twin 2.341 (recipes/moe_lm/results).
        **with_twins(tiny=TINY, facts=knowing(TINY), small=SMALL),
        "paper_15b": Variant(
            paper(12, 768, 12, learning_rate=6e-4, batch=2**19),
            "12 layers, dimension 768, 512 experts: 15 billion parameters",
        ),
        "paper_52b": Variant(
            paper(24, 1024, 16, learning_rate=3e-4, batch=2**19), "24 layers, dimension 1024, 512 experts: 52 billion"
        ),
        "paper_207b": Variant(
            paper(24, 2048, 32, learning_rate=2e-4, batch=2**20), "24 layers, dimension 2048, 512 experts: 207 billion"
        ),
        "paper_1t": Variant(
            paper(32, 4096, 32, learning_rate=1.2e-4, batch=2**21),
            "32 layers, dimension 4096, 512 experts: 1.1 trillion",
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
