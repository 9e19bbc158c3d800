"""The sparsely-gated Mixture of Experts: a language model of LSTM, experts, LSTM.

Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer"
(arXiv:1701.06538). Every layer but the softmax has dropout and a residual; the experts' sum goes through a sigmoid. A
token passes the four experts with the largest noisy scores, weighted by a softmax over those four; with two levels, two
experts in each of two groups. Importance and load losses, 0.1 each, keep the experts equally busy; nothing is dropped.

    python -m moekit.recipes.shazeer                      # minutes on a laptop, nothing to download
    python -m moekit.recipes.shazeer run --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.heads import CausalLMHead
from moekit.layer import AuxLosses, MoELayer
from moekit.recipes._command import Recipe, main
from moekit.recipes._config import DataConfig, EvaluateConfig, LanguageModelTasks, RecipeConfig, TaskConfig, TrainConfig
from moekit.recipes._networks import TWIN_NOTES, with_twins
from moekit.recipes._parts import Built
from moekit.recipes._pipeline import commands
from moekit.recurrent import RecurrentLM
from moekit.routers import HierarchicalRouter, noisy_topk
from moekit.transformer import MLP


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network.

    Attributes:
        dim: width of embeddings and of every layer's input and output.
        units: cells of each LSTM, projected to `dim` where they are more; 0 = dim.
        hidden_dim: of each expert.
        num_experts: of the layer; 0 = dense: one feed-forward as wide as the experts that a token passes.
        groups: into which a two-level gate sorts the experts; 0 = a flat gate.
        k: experts per token of a flat gate; of a two-level gate, groups per token and experts in each.
        importance: weight of the importance loss.
        load: weight of the load loss.
        dropout: on the output of every layer but the softmax.
        tied: whether one table embeds tokens and makes the logits.
    """

    dim: int = 128
    units: int = 0
    hidden_dim: int = 256  # the paper's 512 and 1,024, by four
    num_experts: int = 32
    groups: int = 0
    k: int = 4
    importance: float = 0.1  # appendix C.1, as `load` and `k`
    load: float = 0.1
    dropout: float = 0.0
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Everything a run is made of.

    Attributes:
        model: the network.
        tasks: tokens per step.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    tasks: LanguageModelTasks = field(default_factory=LanguageModelTasks)


def feed_forward(model: ModelConfig) -> nn.Module:
    """The layer between the LSTMs."""
    if not model.num_experts:  # the paper's MoE-1-Wide
        return MLP(model.dim, model.hidden_dim * (model.k**2 if model.groups else model.k))
    experts = GroupedMLP(model.num_experts, model.dim, model.hidden_dim, init_scale=1.0)
    if not model.groups:
        return MoELayer(noisy_topk(model.dim, model.num_experts, k=model.k), experts)
    size, rest = divmod(model.num_experts, model.groups)
    if rest:
        raise UserError(f"model.groups must divide model.num_experts: got {model.groups} and {model.num_experts}.")
    return MoELayer(HierarchicalRouter(model.dim, model.groups, size, k_groups=model.k, k_experts=model.k), experts)


def build(config: Config, vocab_size: int) -> Built:
    """The parts of a run."""
    model = config.model
    network = RecurrentLM(
        vocab_size,
        model.dim,
        feed_forward(model),
        units=model.units or None,
        dropout=model.dropout,
        tied=model.tied,
    )
    weights = {name: weight for name in ("importance", "load") if (weight := getattr(model, name))}
    aux = AuxLosses(**weights) if weights and model.num_experts else None
    return Built(network, [CausalLMHead(label_smoothing=config.train.label_smoothing)], aux)


TINY = Config(
    data=DataConfig(vocab_size=1600),
    train=TrainConfig(
        max_steps=800, max_minutes=4.0, learning_rate=4e-3, label_smoothing=0.0, validate_every=300,
        schedule="inverse_square_root", weight_decay=0.0,  # appendix C.1 but for the rate, which is ours
    ),
    evaluate=EvaluateConfig(beam_size=1, max_sentences=300),
)  # fmt: skip
SMALL = Config(
    data=DataConfig(source="text", vocab_size=4000, temperature=5.0),
    model=ModelConfig(dim=256, hidden_dim=512, num_experts=64, dropout=0.1),
    train=TrainConfig(
        max_steps=0, max_minutes=30.0, warmup_steps=400, label_smoothing=0.0, validate_every=500,
        schedule="inverse_square_root", weight_decay=0.0,
    ),
    evaluate=EvaluateConfig(beam_size=1),
)  # fmt: skip


def paper(
    num_experts: int, *, groups: int = 0, dim: int = 512, units: int = 0, hidden_dim: int = 1024, dropout: float = 0.1
) -> Config:
    """A model of the billion-word benchmark: its 793,471 words, 300,000 words a step, 27,000 steps (10 epochs).

    The learning rate is ours: the paper searched it for every model.

    Source: arXiv:1701.06538 appendix C.1; two-level gates have 16 groups. Dropout, vocabulary and the cells of the
        143-million-operations model from memory; with them the paper's counts come out to the last digit.
    """
    return Config(
        data=DataConfig(source="text", vocab_size=793_471),
        model=ModelConfig(
            dim=dim, units=units, hidden_dim=hidden_dim, num_experts=num_experts, groups=groups, k=2 if groups else 4,
            dropout=dropout,
        ),
        tasks=LanguageModelTasks(causal_lm=TaskConfig(tokens=300_000)),
        train=TrainConfig(
            max_steps=27_000, learning_rate=1e-3, warmup_steps=1000, schedule="inverse_square_root", weight_decay=0.0,
            label_smoothing=0.0,
        ),
        evaluate=EvaluateConfig(beam_size=1),
    )  # fmt: skip


VARIANTS: Mapping[str, Config] = {
    **with_twins(tiny=TINY),
    "tiny_hierarchical": replace(TINY, model=ModelConfig(num_experts=64, groups=8, k=2)),
    **with_twins(small=SMALL),
    "paper_moe_4": paper(4),
    "paper_moe_32": paper(32),
    "paper_moe_256": paper(256),
    "paper_moe_256_h": paper(256, groups=16),
    "paper_moe_1024_h": paper(1024, groups=16, dropout=0.2),
    "paper_moe_4096_h": paper(4096, groups=16, dropout=0.2),
    "paper_moe_34m": paper(1024, groups=16, dim=1024, hidden_dim=2048, dropout=0.3),
    "paper_moe_143m": paper(256, groups=16, dim=1024, units=4096, hidden_dim=8192, dropout=0.4),
}

RECIPE = Recipe(
    name="shazeer",
    about="The sparsely-gated Mixture of Experts of Shazeer et al. (arXiv:1701.06538): LSTM, experts, LSTM.",
    variants=VARIANTS,
    notes={
        **TWIN_NOTES,
        "tiny_hierarchical": "64 experts in 8 groups behind a two-level gate",
        "paper_moe_4": "billion-word benchmark, 4 experts, all of which every token passes",
        "paper_moe_32": "32 experts",
        "paper_moe_256": "256 experts",
        "paper_moe_256_h": "256 experts behind a two-level gate",
        "paper_moe_1024_h": "1,024 experts behind a two-level gate",
        "paper_moe_4096_h": "4,096 experts behind a two-level gate: 4.3 billion parameters in experts",
        "paper_moe_34m": "1,024 larger experts: 34 million products per word",
        "paper_moe_143m": "256 experts larger still: 143 million products per word",
    },
    commands=commands("shazeer", build),
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
