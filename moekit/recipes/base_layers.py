"""BASE layers: training solves a linear assignment, so that every expert gets equally many tokens.

Lewis et al. 2021, "BASE Layers: Simplifying Training of Large, Sparse Models" (arXiv:2103.16716). Between two blocks of
a decoder stands one layer of experts, each a stack of residual feed-forward blocks. Training gives every expert the
same number of tokens, so that the sum of scores is the largest possible; evaluation sends a token where its score is
best. A sigmoid of the score weighs what the expert adds. No balance loss, no capacity, no drops.

    moekit run base_layers                  # minutes on a laptop, nothing to download
    moekit run base_layers --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn

from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.experts import BASELayerStack
from moekit.layer import MoELayer
from moekit.recipes._networks import TEXT, DecoderConfig, feed_forward, knowing, parts, with_twins
from moekit.routers import RankShuffle, base_layers
from moekit.routers.base_layers import EvalAssignment
from moekit.runs import ModelParts, Recipe, RunConfig, RunText, Variant
from moekit.runs.settings import TaskConfig, setting
from moekit.transformer import Side, SparseDense, at_layers


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderConfig):
    """The network.

    Attributes:
        every: spacing of the expert layers: one follows every so many blocks, but never the last block; half of
            `layers` = a single one in the middle, a fourth = three.
        sublayers: number of residual feed-forward blocks in each expert; 3 is the default, 10 in the largest model of
            the paper.
        expert_hidden_dim: hidden size of each block of an expert; 0 = hidden_dim.
        shuffle: whether the tokens of all processes are mixed at random before experts are assigned, which makes a
            balanced assignment cost less quality; no effect on one process.
        eval_assignment: greedy = a token goes to its best expert in evaluation, as in the paper; balanced = evaluation
            assigns as training does, which weighs tokens against later ones: it tells what the greedy choice costs.
    """

    sublayers: int = setting(3, at_least=1)
    expert_hidden_dim: int = setting(0, at_least=0)
    shuffle: bool = True
    eval_assignment: EvalAssignment = "greedy"
    load_balance: float = 0.0  # there is nothing to balance


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model
    if model.gated or model.dropout or model.expert_init_scale != 1:
        raise UserError("experts of BASE layers have no gate, no dropout and an initialisation of their own.")
    hidden_dim = model.expert_hidden_dim or model.hidden_dim

    def experts() -> nn.Module:
        if not model.num_experts:  # as wide as an expert's blocks together
            return feed_forward(model, model.sublayers * hidden_dim)
        # The assignment of training weighs a token against later ones, as in the paper; evaluation does not.
        shuffle = RankShuffle() if model.shuffle else None
        router = base_layers(
            model.dim, model.num_experts, shuffle=shuffle, eval_assignment=model.eval_assignment, allow_future=True
        )
        stack = BASELayerStack(
            model.num_experts, model.dim, hidden_dim, num_layers=model.sublayers, activation=model.activation
        )
        return MoELayer(router, stack)

    def after_block(layer: int, side: Side) -> SparseDense:
        return SparseDense(experts(), feed_forward(model), order="before")  # the block's own feed-forward comes first

    layers = at_layers(
        range(model.every - 1, model.layers - 1, model.every), after_block, lambda layer, side: feed_forward(model)
    )
    return parts(config, text, layers)


TINY = TEXT.tiny.changed(model=ModelConfig(), train={"max_steps": 800})
SMALL = TEXT.small.changed(model=ModelConfig(dim=192, heads=6, layers=6, every=3, hidden_dim=768, sublayers=4))
# One expert on each of 128 devices, which hold two sequences of 1,024 tokens eight times a step.
PAPER = TEXT.paper.changed(
    data={"vocab_size": 51_200, "max_length": 1024},
    model=ModelConfig(
        dim=2048, heads=16, layers=24, every=12, num_experts=128, sublayers=10,
        # The paper's 8,096 makes its 1.3 B of shared parameters (8,192 does too, rounded), but 332 M in an expert;
        # 8,192 makes the 335 M that it names.
        hidden_dim=8096, expert_hidden_dim=8192,
    ),
    tasks={"causal_lm": TaskConfig(tokens=2**21)},
    train={"max_steps": 48_000, "learning_rate": 7.5e-5, "warmup_steps": 2000, "clip": 0.1},
)  # fmt: skip

RECIPE = Recipe(
    name="base_layers",
    about="BASE layers of Lewis et al. (arXiv:2103.16716): balanced assignment of tokens to experts, no loss.",
    build=build,
    variants={
        # Test, one seed: 2.488 nats, its dense twin 2.417 (recipes/base_layers/results).
        **with_twins(tiny=TINY, facts=knowing(TINY)),
        "tiny_x3": Variant(
            TINY.changed(model=ModelConfig(every=1, sublayers=1)),
            "three expert layers of one block instead of one layer of three blocks",
        ),
        **with_twins(small=SMALL),
        "paper": Variant(
            PAPER, "24 layers, dimension 2048, 128 experts of 10 blocks in the middle: 44 billion parameters"
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
