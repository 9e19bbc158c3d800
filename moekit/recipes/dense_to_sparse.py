"""EvoMoE: one expert becomes many, all of them run, and ever fewer do until each token passes one.

Nie et al. 2021, "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate"
(arXiv:2112.14397). A GPT in which every other feed-forward is a layer of experts goes through three phases, given here
as shares of the optimizer steps: the experts are one (and then differ by randomly masked weights); every expert runs
whose Gumbel-softmax probability passes a threshold, while the temperature falls; the most probable one alone runs.

    moekit run dense_to_sparse              # minutes on a laptop, nothing to download
    moekit run dense_to_sparse --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.experts import DensePretraining, MaskWeights
from moekit.layer import MoELayer
from moekit.recipes._networks import TEXT, DecoderConfig, expert_bank, feed_forwards, knowing, parts, with_twins
from moekit.recipes._routers import LEARNED
from moekit.routers import DenseToSparseRouter, ExponentialDecay, LinearDecay
from moekit.runs import ModelParts, Recipe, RunConfig, RunText, Variant
from moekit.runs.settings import SURGERY, TaskConfig, setting
from moekit.transformer import Side

DECAYS: Mapping[str, type[ExponentialDecay | LinearDecay]] = {"exponential": ExponentialDecay, "linear": LinearDecay}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderConfig):
    """The network.

    Attributes:
        evolve: whether the network goes through the phases (the paper); false, for comparison = Switch's router of one
            expert per token from the first step, which wants model.load_balance 0.01.
        diversify: share of train.max_steps in the first phase, in which the experts of a layer are a single
            feed-forward layer.
        masked: share of the weights of each expert that are set to zero, at random, when the first phase ends, to make
            experts differ.
        sparsify: share of train.max_steps in the second phase, in which the temperature falls; after it each token uses
            one expert.
        decay: shape of the fall of the Gumbel-softmax temperature: exponential or linear.
        start: Gumbel-softmax temperature at the start of the second phase.
        end: Gumbel-softmax temperature at the end of the second phase.
        threshold: minimum probability at which an expert processes a token.
        weights: weights with which expert outputs are combined: gumbel (the Gumbel-softmax itself) or plain (the
            softmax of the logits).
    """

    evolve: bool = True
    diversify: float = setting(0.1, at_least=0, at_most=1)
    masked: float = setting(0.1, at_least=0, below=1)
    sparsify: float = setting(0.4, at_least=0, at_most=1)
    decay: Literal["exponential", "linear"] = "exponential"
    start: float = setting(2.0, above=0)
    end: float = setting(0.3, above=0)
    threshold: float = setting(1e-3, at_least=0, below=1, free=SURGERY)
    weights: Literal["gumbel", "plain"] = "gumbel"
    load_balance: float = 0.0  # the gate is said to need none


def phases(config: RunConfig) -> tuple[int, int]:
    """The steps of the dense phase, and those in which the temperature falls."""
    model, steps = config.model, config.train.max_steps
    if not steps:
        raise UserError("the phases are shares of the steps: set train.max_steps (it is 0).")
    if min(model.diversify, model.sparsify) < 0 or model.diversify + model.sparsify > 1:
        raise UserError(
            "model.diversify and model.sparsify must be shares of train.max_steps, together at most 1: got "
            f"{model.diversify} and {model.sparsify}."
        )
    return round(model.diversify * steps), max(1, round(model.sparsify * steps))


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model
    dense, falling = phases(config)

    def sparse(layer: int, side: Side) -> MoELayer:
        if not model.evolve:
            return MoELayer(LEARNED["switch"](model.dim, model.num_experts), expert_bank(model))
        router = DenseToSparseRouter(
            model.dim,
            model.num_experts,
            DECAYS[model.decay](model.start, model.end, falling, begin=dense),
            hard_from=dense + falling,
            threshold=model.threshold,
            weights=model.weights,
        )
        phase = DensePretraining(dense, perturb=MaskWeights(model.masked), seed=config.train.seed + layer)
        return MoELayer(router, expert_bank(model), phase=phase)

    return parts(config, text, feed_forwards(model, sparse))


TINY = TEXT.tiny.changed(
    model=ModelConfig(activation="gelu"),
    # While all experts run a step costs some three times as much: fewer steps than in the other recipes.
    train={"max_steps": 500, "max_minutes": 5.0, "warmup_steps": 100, "validate_every": 250},
)
SMALL = TEXT.small.changed(
    model=ModelConfig(dim=192, heads=6, layers=6, hidden_dim=768, activation="gelu", dropout=0.05),
    train={"max_steps": 3000, "max_minutes": 60.0},
)
# The paper names 1.5 billion parameters. Layers and widths are those of GPT-medium in the released code; 12 experts are
# ours, the number that makes 1.5 billion with them in every other layer (16, which we remember, would make 1.9). Adam's
# betas, weight decay, clipping and dropout are the released code's; steps, rate and phases ours.
PAPER = TEXT.paper.changed(
    data={"vocab_size": 50_257, "max_length": 1024},
    model=ModelConfig(
        dim=1024, heads=16, layers=24, hidden_dim=4096, num_experts=12, activation="gelu", dropout=0.1, checkpoint=True
    ),
    tasks={"causal_lm": TaskConfig(tokens=2**19)},
    train={"max_steps": 100_000, "learning_rate": 3e-4, "warmup_steps": 2000, "weight_decay": 0.1, "clip": 5.0},
)

RECIPE = Recipe(
    name="dense_to_sparse",
    about="EvoMoE and its dense-to-sparse gate (arXiv:2112.14397): one expert, then all experts, then one per token.",
    build=build,
    variants={
        # Test, one seed: 2.477 nats, its dense twin 2.501 at fewer computations (recipes/dense_to_sparse/results).
        **with_twins(tiny=TINY, facts=knowing(TINY)),
        "tiny_gate_only": Variant(
            TINY.changed(model={"diversify": 0.0}), "without the first phase: the dense-to-sparse gate from the start"
        ),
        "tiny_warm_up": Variant(
            TINY.changed(model={"diversify": 0.5, "sparsify": 0.0}),
            "without the second phase: a single expert for half of the steps, then one per token at once",
        ),
        **with_twins(small=SMALL),
        "paper_1b5": Variant(PAPER, "GPT of 1.5 billion parameters"),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
