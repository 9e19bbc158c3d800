"""GShard: multilingual translation by an encoder-decoder with two experts per token in every other layer.

Lepikhin et al. 2020, "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding"
(arXiv:2006.16668). One model translates 100 languages to English. A token goes to its most probable expert and, with
probability min(1, 2 g), to the second one of weight g; the two weights sum to 1 before anything is dropped, first
choices are served first, an expert takes 2 T / E assignments, and what finds no room is carried by the residual. The
balance loss has weight 0.01. The paper makes models deeper (12 or 36 layers) and wider (128 to 2,048 experts).

    moekit run gshard                       # minutes on a laptop, nothing to download
    moekit run gshard --variant small --data.source moses --data.path FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moekit.cli.recipes import main
from moekit.layer import MoELayer
from moekit.recipes._networks import (
    T5_ADAFACTOR,
    TRANSLATION,
    EncoderDecoderConfig,
    expert_bank,
    feed_forwards,
    parts,
    with_lexicon,
    with_twins,
)
from moekit.routers import (
    AllChoices,
    Balance,
    RandomChoice,
    SampledChoice,
    SecondExpertPolicy,
    ThresholdChoice,
    TopKRouter,
)
from moekit.routing import Capacity
from moekit.runs import ModelParts, Recipe, RunConfig, RunText, Variant
from moekit.runs.settings import SURGERY, TaskConfig, setting
from moekit.transformer import Side

SECOND: Mapping[str, SecondExpertPolicy] = {
    "random": RandomChoice(0.5),  # Algorithm 1: 2 g > U(0, 1)
    "always": AllChoices(),
    "threshold": ThresholdChoice(0.2),  # the last two: the authors' and fairseq's code, not the paper
    "sampled": SampledChoice(),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(EncoderDecoderConfig):
    """The network.

    Attributes:
        k: number of experts per token; 2 in the paper.
        capacity_factor: slots of each expert in training as a multiple of an even share of all routed tokens (k per
            token); 1 in the paper, 0 = no limit.
        eval_capacity_factor: slots of each expert in evaluation as a multiple of an even share of all routed tokens (k
            per token); 0 = no limit.
        second_expert: when the second expert of a token is used: random = at random, with probability by its weight
            (the paper); always; threshold = if its weight is above 0.2; sampled = always, but drawn in training from
            the router probabilities.
        group_size: tokens in a local group, which has its own expert slots and load-balancing loss; 0 = all tokens of a
            process.
    """

    k: int = setting(2, at_least=1)
    capacity_factor: float = setting(1.0, at_least=0, free=SURGERY)  # C = 2 T / E (section 2.2)
    eval_capacity_factor: float = setting(0.0, at_least=0, free=SURGERY)  # ours: dropless
    second_expert: Literal["random", "always", "threshold", "sampled"] = "random"
    # Section 2.2: groups are served apart; the paper gives no size but that of a device's batch.
    group_size: int = setting(0, at_least=0)


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model

    def sparse(layer: int, side: Side) -> MoELayer:
        router = TopKRouter(  # with the second expert at random this is `moekit.routers.gshard`
            model.dim,
            model.num_experts,
            k=model.k,
            capacity=Capacity(
                train=model.capacity_factor or None,
                eval=model.eval_capacity_factor or None,
                group_size=model.group_size or None,
            ),
            renormalise="before_drop",
            second_expert=SECOND[model.second_expert],
            balance=Balance(scope="group" if model.group_size else "batch"),
            init_scale=1.0,
        )
        return MoELayer(router, expert_bank(model))

    return parts(config, text, feed_forwards(model, sparse, model.k))


TINY = TRANSLATION.tiny.changed(
    # Many languages to one, of unequal sizes as in the paper; the numbers are ours.
    data={"directions": ("tnd-avl", "kmb-avl", "shl-avl"), "babel_sizes": {"kmb": 10_000, "shl": 3000}},
    model=ModelConfig(),
)
LEXICON = with_lexicon(TINY).changed(data={"babel_languages": 3, "directions": ("tnd-avl", "kmb-avl")})
SMALL = TRANSLATION.small.changed(model=ModelConfig(encoder_layers=4, decoder_layers=4, dropout=0.05))


def paper(num_experts: int, layers: int, batch_tokens: int, *, every: int = 2) -> RunConfig:
    """A published model: dimension 1,024, hidden size 8,192, 16 heads, `layers` blocks in all, half of them decoder's.

    That `layers` counts both sides follows from the published 2.3 billion parameters of the dense model of 96 layers.
    Trained by Adafactor to a trillion tokens; learning rate and vocabulary are ours.

    Source: arXiv:2006.16668 section 4 (table of models and costs).
    """
    return TRANSLATION.paper.changed(
        data={"vocab_size": 64_000},
        model=ModelConfig(
            dim=1024, heads=16, hidden_dim=8192, encoder_layers=layers // 2, decoder_layers=layers // 2,
            num_experts=num_experts, every=every, dropout=0.1, checkpoint=True,
        ),
        tasks={"translation": TaskConfig(tokens=batch_tokens)},
        train={"max_steps": 10**12 // batch_tokens, "precision": "32-true", **T5_ADAFACTOR},
    )  # fmt: skip


MILLION = 2**20

RECIPE = Recipe(
    name="gshard",
    about="GShard (arXiv:2006.16668): multilingual translation with two experts per token.",
    build=build,
    variants={
        # Test, one seed: BLEU 92.4 and chrF 96.2, its dense twin 93.2 and 96.7 (recipes/gshard/results).
        **with_twins(tiny=TINY, lexicon=LEXICON, small=SMALL),
        "paper_12b": Variant(paper(128, 12, MILLION), "12 layers, 128 experts: 12.5 billion parameters"),
        "paper_37b": Variant(paper(128, 36, MILLION), "36 layers, 128 experts: 37 billion"),
        "paper_50b": Variant(paper(512, 12, MILLION), "12 layers, 512 experts: 50 billion"),
        "paper_150b": Variant(paper(512, 36, MILLION), "36 layers, 512 experts: 150 billion"),
        "paper_200b": Variant(paper(2048, 12, 4 * MILLION), "12 layers, 2,048 experts: 200 billion"),
        "paper_600b": Variant(paper(2048, 36, 4 * MILLION), "36 layers, 2,048 experts: 600 billion"),
        "paper_dense_96": Variant(  # no layer is sparse, or as wide as two experts
            paper(0, 96, 4 * MILLION, every=97), "the dense baseline of 96 layers: 2.3 billion"
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
