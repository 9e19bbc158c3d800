"""ST-MoE: a T5 with two experts per token in every fourth layer, a router z-loss, and a dense layer after each.

Zoph et al. 2022, "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (arXiv:2202.08906). An
encoder-decoder learns to restore cut-out spans; feed-forwards and experts are GEGLU, norms are RMS. A token goes to its
best expert and, with probability min(1, g / 0.2), to the second one of weight g; the two weights sum to 1. An expert
takes 1.25 T / E assignments in training, so that of the choices of a batch a third or more find no room, and 2 T / E in
evaluation. The loss is cross-entropy + 0.01 balance + 0.001 z, where z keeps the router's logits small. One more dense
feed-forward, a branch with a norm of its own, follows each sparse layer. The paper's stability study is a table,
recipes/st_moe/ablations/stability.yaml.

    moekit run st_moe                       # minutes on a laptop, nothing to download
    moekit run st_moe --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.layer import MoELayer
from moekit.recipes._networks import (
    SPANS,
    T5_ADAFACTOR,
    EncoderDecoderConfig,
    Norm,
    expert_bank,
    feed_forward,
    feed_forwards,
    knowing,
    parts,
    with_twins,
)
from moekit.routers import st_moe
from moekit.runs import ModelParts, Recipe, RunConfig, RunText, Variant
from moekit.runs.settings import SURGERY, TaskConfig, setting
from moekit.transformer import Side, SparseDense


@dataclass(frozen=True, kw_only=True)
class ModelConfig(EncoderDecoderConfig):
    """The network.

    Attributes:
        k: number of experts per token; 2 in the paper.
        capacity_factor: slots of each expert in training as a multiple of an even share (see capacity_share); 1.25 in
            the paper, 0 = no limit.
        eval_capacity_factor: slots of each expert in evaluation as a multiple of an even share; 2 in the paper, 0 = no
            limit.
        capacity_share: definition of the even share for T tokens and E experts: tokens = T / E, as in the paper, or
            choices = k * T / E.
        threshold: routing weight above which the second expert is always used in training; below, it is used with
            probability weight / threshold. 0.2 in the paper.
        jitter: relative noise on the router's input in training: it is multiplied by a random factor of 1 plus or minus
            at most this value; 0 = none, 0.01 in the paper's stability study.
        batch_prioritised: whether experts of the encoder serve tokens by routing probability instead of position, so
            that the most confident ones are not dropped.
        extra: position of the additional dense feed-forward layer of each sparse layer: after it (the paper), before
            it, or none.
        expert_bias: bias on the hidden units of gated experts: none, add or multiply.
    """

    gated: bool = True
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    norm: Norm = "rms"
    positions: Literal["sinusoidal", "rotary", "relative"] = "relative"
    router_z: float = 1e-3  # eq. 6
    k: int = setting(2, at_least=1)  # section 4.2, which compares 1, 2 and 3, with the factors
    capacity_factor: float = setting(1.25, at_least=0, free=SURGERY)
    eval_capacity_factor: float = setting(2.0, at_least=0, free=SURGERY)
    capacity_share: Literal["tokens", "choices"] = setting("tokens", free=SURGERY)
    threshold: float = setting(0.2, at_least=0, at_most=1, free=SURGERY)  # appendix C
    # Section 3: 1e-2 makes training stable, and is worse.
    jitter: float = setting(0.0, at_least=0, below=1, free=SURGERY)
    batch_prioritised: bool = False
    extra: Literal["after", "before", "none"] = "after"
    expert_bias: Literal["none", "add", "multiply"] = "none"


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model
    if model.expert_bias != "none" and not model.gated:
        raise UserError(f"model.expert_bias {model.expert_bias} needs gated experts: set model.gated true.")
    bias: dict[str, Any] = {"hidden_bias": model.expert_bias} if model.gated else {}

    def sparse(layer: int, side: Side) -> MoELayer:
        router = st_moe(
            model.dim,
            model.num_experts,
            k=model.k,
            capacity_share=model.capacity_share,
            threshold=model.threshold,
            jitter=model.jitter,
            capacity_factor=model.capacity_factor or None,
            eval_capacity_factor=model.eval_capacity_factor or None,
            batch_prioritised=model.batch_prioritised and side == "encoder",
        )
        return MoELayer(router, expert_bank(model, **bias))

    one_branch = feed_forwards(model, sparse, model.k)

    def layers(layer: int, side: Side) -> nn.Module | SparseDense | None:
        made = one_branch(layer, side)
        if model.extra == "none" or (layer + 1) % model.every or not isinstance(made, nn.Module):
            return made
        return SparseDense(made, feed_forward(model), order=model.extra)

    return parts(config, text, layers, of_zero=True)  # a z-loss of weight 0 is seen in the metrics


TINY = SPANS.tiny.changed(
    # GEGLU has three matrices: 2/3 of 512, rounded. One sparse layer of two on each side, for want of more (ours).
    model=ModelConfig(hidden_dim=336),
    train={"max_steps": 1500},
)
SMALL = SPANS.small.changed(
    model=ModelConfig(hidden_dim=336, encoder_layers=4, decoder_layers=4, every=4, dropout=0.05),
)


def paper(dim: int, heads: int, head_dim: int, hidden_dim: int, num_experts: int, steps: int) -> RunConfig:
    """A published model: 24 + 24 blocks, experts in every fourth, T5's vocabulary in one table.

    Sources disagree: table 11 says 27 layers, the authors' configuration (flaxformer) 24 and the extra feed-forwards.
    The latter makes the published counts, 4.1 and 269 billion; so do 27 layers without extra feed-forwards.
    Trained by Adafactor, at T5's rate.

    Source: arXiv:2202.08906 section 3 and table 11.
    """
    return SPANS.paper.changed(
        data={"vocab_size": 32_128, "max_length": 512},
        model=ModelConfig(
            dim=dim, heads=heads, head_dim=head_dim, hidden_dim=hidden_dim, encoder_layers=24, decoder_layers=24,
            num_experts=num_experts, every=4, checkpoint=True,
            init_scale=0.1, expert_init_scale=0.1, init_by_depth=False,  # Switch's, as the paper says
        ),
        tasks={"span_corruption": TaskConfig(tokens=10**6)},
        train={"max_steps": steps, **T5_ADAFACTOR},
    )  # fmt: skip


RECIPE = Recipe(
    name="st_moe",
    about="ST-MoE (arXiv:2202.08906): a T5 with two experts per token, kept stable by a router z-loss.",
    build=build,
    variants={
        # Test, one seed: 1.785 nats, its dense twin 1.627 (recipes/st_moe/results).
        **with_twins(tiny=TINY, facts=knowing(TINY, hidden_dim=84), small=SMALL),
        "paper_l": Variant(  # 500 B tokens
            paper(1024, 16, 64, 2816, 32, steps=500_000), "ST-MoE-L, 32 experts: 4.1 billion parameters"
        ),
        "paper_32b": Variant(  # 1.5 T tokens
            paper(5120, 64, 128, 20_480, 64, steps=1_500_000), "ST-MoE-32B, 64 experts: 269 billion"
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
