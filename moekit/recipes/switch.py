"""Switch Transformer: a T5 in which one expert of many replaces every other feed-forward.

Fedus et al. 2021, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity"
(arXiv:2101.03961). An encoder-decoder learns to restore cut-out spans (15 %); a token passes the one expert that a
float32 softmax router finds most probable, times its probability. An expert takes `capacity_factor` times an even
share of the tokens, in their order; the others are carried by the residual. Training perturbs the router's input by
1e-2, adds 1e-2 times the balance loss of every layer, and begins with a tenth of the usual variance.

    moekit run switch                       # minutes on a laptop, nothing to download
    moekit run switch --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moekit.cli.recipes import main
from moekit.layer import MoELayer
from moekit.recipes._networks import (
    SPANS,
    T5_ADAFACTOR,
    EncoderDecoderConfig,
    Norm,
    expert_bank,
    feed_forwards,
    knowing,
    parts,
    with_twins,
)
from moekit.routers import (
    Exploration,
    InputDropout,
    InputJitter,
    NoTokenLeftBehind,
    RandomChoice,
    SampledSoftmax,
    TopKRouter,
)
from moekit.routing import Capacity
from moekit.runs import ModelParts, Recipe, RunConfig, RunText, Variant
from moekit.runs.settings import SURGERY, TaskConfig, setting
from moekit.transformer import Side

EXPLORATION: Mapping[str, Exploration | None] = {  # compared in appendix C; the rate of dropout is ours
    "jitter": InputJitter(1e-2),
    "dropout": InputDropout(0.1),
    "sample": SampledSoftmax(),
    "none": None,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(EncoderDecoderConfig):
    """The network.

    Attributes:
        k: number of experts per token: 1 (Switch), or 2 for the paper's MoE-Base, which routes the second expert as
            GShard does.
        capacity_factor: slots of each expert in training as a multiple of T / E (tokens / experts), whatever k is; 1 to
            2 in the paper, 0 = no limit.
        eval_capacity_factor: slots of each expert in evaluation as a multiple of T / E (tokens / experts), whatever k
            is; 0 = no limit.
        exploration: randomness of the router in training: jitter or dropout on its input, sample (draw the expert from
            its probabilities), or none.
        overflow: treatment of tokens beyond the capacity: drop, or reroute to their next choice ("no token left
            behind").
    """

    norm: Norm = "rms"  # norm, positions and activation as in T5
    positions: Literal["sinusoidal", "rotary", "relative"] = "relative"
    k: int = setting(1, at_least=1)
    capacity_factor: float = setting(1.25, at_least=0, free=SURGERY)
    eval_capacity_factor: float = setting(0.0, at_least=0, free=SURGERY)  # ours: dropless
    exploration: Literal["jitter", "dropout", "sample", "none"] = "jitter"
    overflow: Literal["drop", "reroute"] = "drop"


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model

    def sparse(layer: int, side: Side) -> MoELayer:
        router = TopKRouter(  # with one expert, jitter and drop this is `moekit.routers.switch`
            model.dim,
            model.num_experts,
            k=model.k,
            capacity=Capacity(
                train=model.capacity_factor or None, eval=model.eval_capacity_factor or None, share="tokens"
            ),
            renormalise="none" if model.k == 1 else "before_drop",
            second_expert=None if model.k == 1 else RandomChoice(0.5),
            exploration=EXPLORATION[model.exploration],
            overflow=NoTokenLeftBehind() if model.overflow == "reroute" else None,
            allow_future=model.overflow == "reroute",  # whose second tries wait for later tokens, as in the original
        )
        return MoELayer(router, expert_bank(model))

    return parts(config, text, feed_forwards(model, sparse, model.k))


# Capacity 1.25, jitter and balance weight as in the paper; sizes and init ours.
TINY = SPANS.tiny.changed(model=ModelConfig(), train={"max_steps": 1500})
SMALL = SPANS.small.changed(
    model=ModelConfig(encoder_layers=4, decoder_layers=4, dropout=0.05),
)


def paper(
    dim: int, heads: int, hidden_dim: int, layers: int, num_experts: int, *, every: int = 2, gated: bool = False
) -> RunConfig:
    """A published model: T5's vocabulary, heads of 64 channels, 2 ** 20 tokens a step, 550,000 steps of C4.

    Trained by Adafactor, at T5's rate.

    Source: arXiv:2101.03961; sizes of C and XXL arXiv:2202.08906 table 11.
    """
    return SPANS.paper.changed(
        data={"vocab_size": 32_128, "max_length": 512},
        model=ModelConfig(
            dim=dim, heads=heads, head_dim=64, hidden_dim=hidden_dim, encoder_layers=layers, decoder_layers=layers,
            num_experts=num_experts, every=every, gated=gated, activation="gelu" if gated else "relu", dropout=0.1,
            init_scale=0.1, expert_init_scale=0.1, init_by_depth=False, checkpoint=True,
        ),
        tasks={"span_corruption": TaskConfig(tokens=2**20)},
        train={"max_steps": 550_000, **T5_ADAFACTOR},
    )  # fmt: skip


RECIPE = Recipe(
    name="switch",
    about="Switch Transformer (arXiv:2101.03961): a T5 with one expert per token in every other layer.",
    build=build,
    variants={
        # Test, one seed: 1.999 nats, its dense twin 2.030 (recipes/switch/results).
        # What is dropped cannot be learnt: the paper's largest capacity factor.
        **with_twins(tiny=TINY, facts=knowing(TINY, capacity_factor=2.0), small=SMALL),
        "paper_base_64": Variant(paper(768, 12, 3072, 12, 64), "T5-Base with 64 experts: 3.8 billion parameters"),
        "paper_base_128": Variant(paper(768, 12, 3072, 12, 128), "T5-Base with 128 experts: 7.4 billion"),
        "paper_base_256": Variant(paper(768, 12, 3072, 12, 256), "T5-Base with 256 experts: 14.7 billion"),
        # 26.3 B follow from T5-Large's ReLU layers of 4,096; GEGLU layers of 2,816, which we remember, would make
        # 27.1 B.
        "paper_large": Variant(paper(1024, 16, 4096, 24, 128), "T5-Large with 128 experts: 26.3 billion"),
        "paper_c": Variant(
            paper(2080, 32, 6144, 15, 2048, every=1), "Switch-C, 2,048 experts in every layer: 1,571 billion"
        ),
        # Sources disagree: 64 experts at every 4th layer (arXiv:2202.08906 table 11) would make 106 B; 128 at every
        # 2nd (flaxformer's configuration) make the published 395 B.
        "paper_xxl": Variant(paper(4096, 64, 10_240, 24, 128, gated=True), "Switch-XXL: 395 billion"),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
