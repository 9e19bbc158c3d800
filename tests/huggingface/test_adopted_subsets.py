"""The words of fine-tuning on adopted models: which parameters they name, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from adoptable import CONFIGS
from adoptable import model as adoptable

from moekit.folders.parameters import said_of, trained_parameters, unreached
from moekit.huggingface import adopt
from moekit.layer import moe_layers
from moekit.surgery import add_adapters
from moekit.training.fine_tuning import subset, train_only


@pytest.mark.parametrize("block", CONFIGS)
def test_subsets_of_adopted_models(block: str) -> None:
    """Routers and experts are those of the layers, whatever their names; nothing is in two kinds."""
    made = adopt(adoptable(block))
    layers = dict(moe_layers(made))
    for word, part in (("routers", "router"), ("experts", "experts")):
        train_only(made, subset(word))
        trained = {id(p) for p in made.parameters() if p.requires_grad}
        assert trained == {id(p) for layer in layers.values() for p in getattr(layer, part).parameters()}
        assert {one.kind for one in trained_parameters(made)} == {word}
    found = {word: subset(word).find(made) for word in ("routers", "experts", "attention", "feed_forward")}
    assert sum(map(len, found.values())) == len(frozenset().union(*found.values()))
    assert all("self_attn" in name for name in found["attention"])
    assert len(found["attention"]) >= 4 * made.config.num_hidden_layers
    dense = any(word in block for word in ("Qwen2", "Deepseek"))  # shared experts, or a first layer without experts
    assert bool(found["feed_forward"]) == dense
    assert all("mlp." in name for name in found["feed_forward"])


def test_what_is_said_of_trained_parameters() -> None:
    made = adopt(adoptable("DeepseekV3MoE"))  # the first of two layers is dense
    sizes = {name: p.numel() for name, p in made.named_parameters()}
    assert said_of(made)[0] == f"{sum(sizes.values()):,} of {sum(sizes.values()):,} parameters train"
    add_adapters(made, rank=2, targets=("experts", "routers"))
    trained = train_only(made, subset("adapters"))
    experts = 8 * (2 * (32 + 40) + 2 * (20 + 32))
    routers = 2 * (32 + 8)
    assert trained.trained == experts + routers
    total = sum(sizes.values()) + trained.trained
    assert said_of(made) == [
        f"{trained.trained:,} of {total:,} parameters train",
        f"layer 1: experts 8 x {experts // 8:,}, routers {routers}",
    ]
    assert unreached(made, ["experts", "routers"]) == []


def test_adapters_that_reach_no_expert() -> None:
    made = adopt(adoptable("MixtralSparseMoeBlock"))
    with torch.no_grad():
        add_adapters(made, rank=2, targets=("attention",))
    train_only(made, subset("adapters"))
    each = 2 * ((32 + 32) * 2 + (32 + 16) * 2)
    assert said_of(made)[1:] == [f"layers 0 to 1, each: attention {each}"]
    assert unreached(made, ["attention", "feed_forward"]) == [
        "adapters on feed_forward reach nothing: MixtralForCausalLM has no matrix of that kind.",
        "no adapter reaches an expert: those on attention leave all experts as they are.",
    ]
