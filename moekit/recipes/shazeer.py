"""The sparsely-gated Mixture of Experts: a language model of LSTM, experts, LSTM.

Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer"
(arXiv:1701.06538). Every layer but the softmax has dropout and a residual; the experts' sum goes through a sigmoid. A
token passes the four experts with the largest noisy scores, weighted by a softmax over those four; with two levels, two
experts in each of two groups. Importance and load losses, 0.1 each, keep the experts equally busy; nothing is dropped.

    moekit run shazeer                      # minutes on a laptop, nothing to download
    moekit run shazeer --variant small --data.source text --data.path FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from torch import nn

from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.heads import CausalLMHead
from moekit.layer import AuxLosses, MoELayer
from moekit.recipes._networks import TEXT, knowing, with_twins
from moekit.recurrent import RecurrentLM
from moekit.routers import HierarchicalRouter, noisy_topk
from moekit.runs import ModelParts, Recipe, RunConfig, RunText, Variant
from moekit.runs.settings import SURGERY, TaskConfig, setting
from moekit.transformer import MLP


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network.

    Attributes:
        dim: width of embeddings and of the input and output of every layer.
        units: number of units of each LSTM, projected to `dim` if larger; 0 = dim.
        hidden_dim: hidden size of each expert; 1,024 in most models of the paper.
        num_experts: number of experts; 0 = no experts: the baseline of equal operations per token.
        groups: number of groups of the experts under a two-level (hierarchical) gate; 0 = a flat gate.
        baseline: what stands in the place of the experts where num_experts is 0: feed_forward (as wide as all experts
            used by a token), or lstm (as many further LSTMs as have at most its multiplications).
        k: number of experts per token under a flat gate; under a two-level gate, groups per token and experts per
            group. 4 in the paper, 2 under a two-level gate.
        importance: weight of the importance loss, which evens out gate weights; 0.1 in the paper.
        load: weight of the load loss, which evens out the number of tokens; 0.1 in the paper.
        dropout: dropout probability on the output of every layer but the softmax; 0.1 to 0.4 in the paper.
        tied: whether input embeddings and output layer share their weights.
    """

    dim: int = setting(128, at_least=1)
    units: int = setting(0, at_least=0)
    hidden_dim: int = setting(256, at_least=1)  # the paper's 512 and 1,024, by four
    num_experts: int = setting(32, at_least=0, free=SURGERY)
    baseline: Literal["feed_forward", "lstm"] = "feed_forward"
    groups: int = setting(0, at_least=0)
    k: int = setting(4, at_least=1)
    importance: float = setting(0.1, at_least=0)  # appendix C.1, as `load` and `k`
    load: float = setting(0.1, at_least=0)
    dropout: float = setting(0.0, at_least=0, below=1, free=SURGERY)
    tied: bool = False


def active_dim(model: ModelConfig) -> int:
    """Hidden units of all experts that a token passes."""
    return model.hidden_dim * (model.k**2 if model.groups else model.k)


def further_lstms(model: ModelConfig) -> int:
    """LSTMs in the place of the experts, of about their multiplications: two in the paper's 4xLSTM-512.

    Raises:
        UserError: not one LSTM has as few.
    """
    units = model.units or model.dim
    each = 8 * model.dim * units + (model.dim * units if units > model.dim else 0)  # four gates; the projection
    count = 2 * model.dim * active_dim(model) // each
    if not count:
        raise UserError(
            f"model.baseline lstm needs experts of at least the operations of an LSTM of {units} units: those of a "
            f"token have {active_dim(model)} hidden units together. Give a larger model.hidden_dim or model.k."
        )
    return count


def feed_forward(model: ModelConfig) -> nn.Module | None:
    """The layer between the LSTMs; None where there are only LSTMs."""
    if not model.num_experts:  # the paper's 4xLSTM-512 and MoE-1-Wide
        return None if model.baseline == "lstm" else MLP(model.dim, active_dim(model))
    experts = GroupedMLP(model.num_experts, model.dim, model.hidden_dim, init_scale=1.0)
    if not model.groups:
        return MoELayer(noisy_topk(model.dim, model.num_experts, k=model.k), experts)
    size, rest = divmod(model.num_experts, model.groups)
    if rest:
        raise UserError(f"model.groups must divide model.num_experts: got {model.groups} and {model.num_experts}.")
    return MoELayer(HierarchicalRouter(model.dim, model.groups, size, k_groups=model.k, k_experts=model.k), experts)


def build(config: RunConfig, text: RunText) -> ModelParts:
    """The parts of a run."""
    model = config.model
    between = feed_forward(model)
    network = RecurrentLM(
        text.vocab_size,
        model.dim,
        between,
        lstms=2 if between is not None else 2 + further_lstms(model),
        units=model.units or None,
        dropout=model.dropout,
        tied=model.tied,
    )
    weights = {name: weight for name in ("importance", "load") if (weight := getattr(model, name))}
    aux = AuxLosses(**weights) if weights and model.num_experts else None
    return ModelParts(network, [CausalLMHead(label_smoothing=config.train.label_smoothing)], aux)


C1 = {"schedule": "inverse_square_root", "weight_decay": 0.0}  # appendix C.1; learning rates are ours
TINY = TEXT.tiny.changed(model=ModelConfig(), train={"max_steps": 800, "learning_rate": 4e-3, **C1})
SMALL = TEXT.small.changed(model=ModelConfig(dim=256, hidden_dim=512, num_experts=64, dropout=0.1), train=C1)


def paper(
    num_experts: int, *, groups: int = 0, dim: int = 512, units: int = 0, hidden_dim: int = 1024, dropout: float = 0.1
) -> RunConfig:
    """A model of the billion-word benchmark: its 793,471 words, 300,000 words a step, 27,000 steps (10 epochs).

    The learning rate is ours: the paper searched it for every model.

    Source: arXiv:1701.06538 appendix C.1; two-level gates have 16 groups. Dropout, vocabulary and the cells of the
        143-million-operations model from memory; with them the paper's counts come out to the last digit.
    """
    return TEXT.paper.changed(
        data={"vocab_size": 793_471},
        model=ModelConfig(
            dim=dim, units=units, hidden_dim=hidden_dim, num_experts=num_experts, groups=groups, k=2 if groups else 4,
            dropout=dropout,
        ),
        tasks={"causal_lm": TaskConfig(tokens=300_000)},
        train={"max_steps": 27_000, "learning_rate": 1e-3, "warmup_steps": 1000, "precision": "auto", **C1},
    )  # fmt: skip


RECIPE = Recipe(
    name="shazeer",
    about="The sparsely-gated Mixture of Experts of Shazeer et al. (arXiv:1701.06538): LSTM, experts, LSTM.",
    build=build,
    variants={
        # Test, one seed: perplexity 11.51, its dense twin 11.50 (recipes/shazeer/results).
        **with_twins(tiny=TINY, facts=knowing(TINY)),
        "tiny_hierarchical": Variant(
            TINY.changed(model=ModelConfig(num_experts=64, groups=8, k=2)),
            "64 experts in 8 groups behind a two-level gate",
        ),
        **with_twins(small=SMALL),
        "paper_moe_4": Variant(paper(4), "billion-word benchmark, 4 experts, all of which every token passes"),
        "paper_moe_32": Variant(paper(32), "32 experts"),
        "paper_moe_256": Variant(paper(256), "256 experts"),
        "paper_moe_256_h": Variant(paper(256, groups=16), "256 experts behind a two-level gate"),
        "paper_moe_1024_h": Variant(paper(1024, groups=16, dropout=0.2), "1,024 experts behind a two-level gate"),
        "paper_moe_4096_h": Variant(
            paper(4096, groups=16, dropout=0.2),
            "4,096 experts behind a two-level gate: 4.3 billion parameters in experts",
        ),
        "paper_moe_34m": Variant(
            paper(1024, groups=16, dim=1024, hidden_dim=2048, dropout=0.3),
            "1,024 larger experts: 34 million products per word",
        ),
        "paper_moe_143m": Variant(
            paper(256, groups=16, dim=1024, units=4096, hidden_dim=8192, dropout=0.4),
            "256 experts larger still: 143 million products per word",
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
