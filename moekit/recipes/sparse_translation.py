"""Tricks for sparse translation: begin dense, go on sparse; begin by size, go on evenly.

Dua et al. 2021, "Tricks for Training Sparse Translation Models" (arXiv:2110.08246). Trained without further ado, a
sparse translation model may lose to a dense one. Two tricks on top of BASE layers (one expert per token, balanced by
assignment in training, a sigmoid gate, no loss) in an encoder-decoder:

- dense pre-training: for the first `dense_steps` updates all experts of a layer are one feed-forward; then each goes on
  from it, and a new router begins to choose;
- temperature heating: directions are drawn with p ~ n ** (1 / T), where T rises from 1 in `heating_steps` updates, so
  that small ones come late, when experts no longer settle on them, and are not overfitted before.

The arms: `tiny` has both tricks, `tiny_sparse` none, `tiny_dense` no experts; YAML files have one trick alone.

    moekit run sparse_translation           # minutes on a laptop, nothing to download
    moekit run sparse_translation --variant small --data.source moses --data.path FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from moekit.cli.recipes import main
from moekit.experts import DensePretraining
from moekit.layer import MoELayer
from moekit.recipes._networks import (
    TRANSLATION,
    EncoderDecoderConfig,
    expert_bank,
    feed_forwards,
    parts,
    with_lexicon,
    with_twins,
)
from moekit.routers import base_layers
from moekit.routers.base_layers import EvalAssignment
from moekit.runs import ModelParts, Recipe, RunConfig, RunText, Variant
from moekit.runs.settings import setting
from moekit.transformer import Side


@dataclass(frozen=True, kw_only=True)
class ModelConfig(EncoderDecoderConfig):
    """The network.

    Attributes:
        dense_steps: number of first optimizer steps in which the experts of a layer are a single feed-forward layer
            (dense pre-training); 0 = sparse from the start.
        eval_assignment: greedy = a token goes to its best expert in evaluation, as in BASE layers; balanced =
            evaluation assigns as training does, which weighs tokens against each other: it tells what the greedy
            choice costs.
    """

    load_balance: float = 0.0  # the assignment balances
    dense_steps: int = setting(0, at_least=0)
    eval_assignment: EvalAssignment = "greedy"


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model

    def sparse(layer: int, side: Side) -> MoELayer:
        # In training the assignment weighs a token against later ones, in the decoder too, as in BASE layers.
        router = base_layers(model.dim, model.num_experts, eval_assignment=model.eval_assignment, allow_future=True)
        phase = DensePretraining(model.dense_steps) if model.dense_steps else None
        return MoELayer(router, expert_bank(model), phase=phase)

    return parts(config, text, feed_forwards(model, sparse))


def without_tricks(config: RunConfig) -> RunConfig:
    """The sparse model as it is: no dense phase, and directions drawn by size throughout."""
    return config.changed(data={"temperature": 1.0, "heating_steps": 0}, model={"dense_steps": 0})


# Sizes, steps and the end of heating are ours: the paper's body was not at hand. The form of heating is the paper's.
TINY = TRANSLATION.tiny.changed(
    data={
        # One language to three and back, with much, little and very little text.
        "directions": ("tnd-avl", "kmb-avl", "shl-avl", "avl-tnd", "avl-kmb", "avl-shl"),
        "babel_sizes": {"kmb": 3000, "shl": 600},
        "temperature": 5.0,
        "heating": "square_root",
        "heating_steps": 800,
    },
    model=ModelConfig(dense_steps=250),
    evaluate={"max_sentences": 100},
)
LEXICON = with_lexicon(TINY, dense_steps=500).changed(
    data={
        "babel_languages": 3,
        # Into one language: with both ways a run of minutes learns no words (recipes/sparse_translation/ablations).
        "directions": ("tnd-avl", "kmb-avl"),
        "babel_sizes": {"kmb": 20_000},
        "heating_steps": 1600,
    },
)
SMALL = TRANSLATION.small.changed(
    data={"heating": "square_root", "heating_steps": 3000},
    model=ModelConfig(encoder_layers=4, decoder_layers=4, dropout=0.05, dense_steps=1000),
)

RECIPE = Recipe(
    name="sparse_translation",
    about="Tricks for sparse translation (arXiv:2110.08246): BASE layers with a dense start and a rising temperature.",
    build=build,
    variants={
        # Test, one seed: BLEU 70.4 and chrF 84.3, its dense twin 63.6 and 80.2 (recipes/sparse_translation/results).
        **with_twins(tiny=TINY, lexicon=LEXICON, small=SMALL),
        "tiny_sparse": Variant(without_tricks(TINY), "tiny without the tricks"),
        "small_sparse": Variant(without_tricks(SMALL), "small without the tricks"),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
