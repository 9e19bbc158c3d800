"""DeepSpeed-MoE: PR-MoE, a pyramid of experts beside a dense branch, and the plain MoE that it is compared with.

Rajbhandari et al. 2022, "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI
Scale" (arXiv:2201.05596). A GPT with experts in every other layer, one per token. Residual: every token passes a dense
feed-forward beside its expert, and the two are added. Pyramid: the last two layers of experts have twice as many. The
balance loss has weight 0.01, summed over layers; an expert takes an even share of the tokens.

    moekit run deepspeed_moe                # minutes on a laptop, nothing to download
    moekit run deepspeed_moe --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from moekit.cli.recipes import main
from moekit.experts import copy_first_expert_
from moekit.layer import MoELayer
from moekit.mixing import SoftmaxMix
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
from moekit.routers import TopKRouter
from moekit.routing import Capacity
from moekit.runs import ModelParts, Recipe, RunConfig, RunText, Variant
from moekit.runs.settings import SURGERY, TaskConfig, setting
from moekit.transformer import Side, at_layers, pyramid


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderConfig):
    """The network.

    Attributes:
        half: which half of the layers has experts: both, the first, or the second.
        doubled: number of last sparse layers with twice as many experts (the pyramid); 0 = no pyramid.
        residual: dense branch beside the experts (residual MoE): none, add (its output is added), or softmax (mixed in
            with learned weights).
        expert_init: whether the experts of a layer are initialised independently, or as copies of one.
        capacity_factor: slots of each expert in training as a multiple of an even share of the tokens; 1 to 2 is usual,
            0 = no limit.
    """

    half: Literal["both", "first", "second"] = "both"
    doubled: int = setting(1, at_least=0)
    residual: Literal["none", "add", "softmax"] = "add"  # the paper adds, the released code mixes
    expert_init: Literal["independent", "copied"] = "independent"  # the released code copies
    capacity_factor: float = setting(1.0, at_least=0, free=SURGERY)


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model
    half = {"both": (0, 2), "first": (0, 1), "second": (1, 2)}[model.half]
    begin, end = (number * model.layers // 2 for number in half)
    places = [place for place in range(model.every - 1, model.layers, model.every) if begin <= place < end]
    counts = [0] * model.layers
    for number, place in enumerate(places):
        counts[place] = model.num_experts * (2 if len(places) - number <= model.doubled else 1)

    def sparse(layer: int, side: Side, num_experts: int) -> MoELayer:
        router = TopKRouter(model.dim, num_experts, capacity=Capacity(train=model.capacity_factor or None))
        experts = expert_bank(model, num_experts)
        if model.expert_init == "copied":
            copy_first_expert_(experts)
        if model.residual == "none":
            return MoELayer(router, experts)
        mix = SoftmaxMix(model.dim) if model.residual == "softmax" else None
        return MoELayer(router, experts, shared=feed_forward(model), mix=mix)

    if model.num_experts:
        layers = pyramid(counts, sparse, lambda layer, side: feed_forward(model))
    else:
        twin = dense_twin_layer(model, 1 if model.residual == "none" else 2)
        layers = at_layers(places, twin, lambda layer, side: feed_forward(model))
    return parts(config, text, layers)


TINY = TEXT.tiny.changed(model=ModelConfig(num_experts=4, activation="gelu"), train={"max_steps": 900})
SMALL = TEXT.small.changed(
    model=ModelConfig(dim=192, heads=6, layers=6, hidden_dim=768, num_experts=8, activation="gelu", dropout=0.05),
)


def plain(config: RunConfig, num_experts: int) -> RunConfig:
    """The same without pyramid and residual: one expert per token, equally many in every sparse layer."""
    return config.changed(model={"num_experts": num_experts, "doubled": 0, "residual": "none"})


def paper(
    layers: int, dim: int, heads: int, num_experts: int, *, batch: int, learning_rate: float, residual: bool = True
) -> RunConfig:
    """A published model: hidden size 4 D, 2,048 tokens a sequence, 300 B tokens of which 375 M of warm-up.

    Source: arXiv:2201.05596 and the released training scripts; weight decay and betas of Megatron, from memory. The
    scripts' cosine ends at 1e-6, ours at a twentieth of the peak.
    """
    tokens = 2048 * batch
    config = TEXT.paper.changed(
        data={"vocab_size": 50_257, "max_length": 2048},
        model=ModelConfig(
            layers=layers, dim=dim, heads=heads, hidden_dim=4 * dim, num_experts=num_experts, doubled=2,
            activation="gelu", checkpoint=True,
        ),
        tasks={"causal_lm": TaskConfig(tokens=tokens)},
        train={
            "max_steps": round(300e9 / tokens), "warmup_steps": round(375e6 / tokens), "learning_rate": learning_rate,
            "weight_decay": 0.1, "betas": (0.9, 0.95),
        },
    )  # fmt: skip
    return config if residual else plain(config, num_experts)


RECIPE = Recipe(
    name="deepspeed_moe",
    about="DeepSpeed-MoE (arXiv:2201.05596): a pyramid of experts beside a dense branch (PR-MoE), and plain MoE.",
    build=build,
    variants={
        # Test, one seed: 2.339 nats, its dense twin 2.341 (recipes/deepspeed_moe/results).
        **with_twins(tiny=TINY, facts=knowing(TINY)),
        "tiny_moe": Variant(plain(TINY, 8), "plain MoE with 8 experts in each sparse layer, no dense branch"),
        **with_twins(small=SMALL),
        "paper_125m_moe_64": Variant(
            paper(12, 768, 12, 64, batch=256, learning_rate=4.5e-4, residual=False),
            "12 layers, dimension 768, 64 experts",
        ),
        "paper_350m_moe_128": Variant(
            paper(24, 1024, 16, 128, batch=256, learning_rate=2e-4, residual=False),
            "24 layers, dimension 1024, 128 experts: 13 billion parameters",
        ),
        "paper_350m_pr_moe": Variant(
            paper(24, 1024, 16, 32, batch=256, learning_rate=3e-4), "PR-MoE with 32 and 64 experts: 4 billion"
        ),
        "paper_1b3_moe_128": Variant(
            paper(24, 2048, 16, 128, batch=512, learning_rate=1.2e-4, residual=False),
            "24 layers, dimension 2048, 128 experts: 52 billion",
        ),
        "paper_1b3_pr_moe": Variant(
            paper(24, 2048, 16, 64, batch=512, learning_rate=1.2e-4), "PR-MoE with 64 and 128 experts: 31 billion"
        ),
        "paper_1b3_mos": Variant(
            paper(21, 2048, 16, 64, batch=512, learning_rate=1.2e-4),
            "the student of paper_1b3_pr_moe with 21 layers: 27 billion (train it as usual, or by distill)",
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
