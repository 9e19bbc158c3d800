"""First weights by name: runs whose models differ in some modules begin alike in all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit.experts import GroupedMLP, copy_first_expert_
from moekit.runs import RunText
from moekit.runs.known import recipe_names
from moekit.runs.recipe import find_recipe
from moekit.transformer import EncoderDecoder, init_weights_by_name

VOCABULARY = 120


def first_weights(recipe: str, seed: int, by_name: bool = True, **model: Any) -> dict[str, Tensor]:
    """Of `tiny` with other settings of the model."""
    found = find_recipe(recipe, "")
    config = found.default.changed(model=model)
    torch.manual_seed(seed)
    made = found.parts(config, RunText(VOCABULARY)).named()
    if by_name:
        init_weights_by_name(made, seed)
    return {name: p.detach().clone() for name, p in made.named_parameters()}


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_sparse_model_and_its_twin_share_all_that_both_have(recipe: str) -> None:
    sparse, dense = first_weights(recipe, 3), first_weights(recipe, 3, num_experts=0)
    both = [name for name, weight in sparse.items() if name in dense and weight.shape == dense[name].shape]
    assert len(both) > 3
    assert not [name for name in both if not torch.equal(sparse[name], dense[name])]
    other = first_weights(recipe, 4)
    drawn = [name for name in both if sparse[name].dim() > 1 and sparse[name].std() > 0]
    assert len(drawn) > 2
    assert not [name for name in drawn if torch.equal(sparse[name], other[name])]


def test_one_after_the_other_they_would_not() -> None:
    sparse, dense = (first_weights("switch", 3, by_name=False, num_experts=n) for n in (8, 0))
    last = "backbone.decoder.layers.1.self_attention.qkv.weight"
    assert not torch.equal(sparse[last], dense[last])


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_distribution_is_that_of_the_usual_way(recipe: str) -> None:
    """Every tensor has the size that it has otherwise, to what a few hundred draws allow."""
    usual, named = first_weights(recipe, 5, by_name=False), first_weights(recipe, 5)
    assert usual.keys() == named.keys()
    for name, weight in usual.items():
        if weight.numel() < 500:
            continue
        rms, again = (float(w.square().mean().sqrt()) for w in (weight, named[name]))
        assert again == pytest.approx(rms, rel=0.25, abs=1e-8), name


def test_modules_draw_apart() -> None:
    """Two modules of one kind are not the same draw, and one that comes between others changes none of them."""
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    longer = nn.ModuleDict({"a": nn.Linear(8, 8), "between": nn.Linear(5, 5), "b": nn.Linear(8, 8)})
    for made in (net, longer):
        init_weights_by_name(made, 7)
    assert not torch.equal(net["a"].weight, net["b"].weight)
    assert torch.equal(net["b"].weight, longer["b"].weight)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3)), "training begins with the seed's own stream"


def test_copies_stay_copies() -> None:
    """Experts that a dense phase ties, or that start as copies, are one expert after the draw, and not the former."""
    bank = GroupedMLP(4, 8, 16)
    copy_first_expert_(bank)
    before = bank.w_in.detach().clone()
    init_weights_by_name(bank, 1)
    assert torch.equal(bank.w_in[0], bank.w_in[3])
    assert not torch.equal(bank.w_in, before)
    apart = GroupedMLP(4, 8, 16)
    init_weights_by_name(apart, 1)
    assert not torch.equal(apart.w_in[0], apart.w_in[3])


def test_tied_tables_stay_tied() -> None:
    model = EncoderDecoder(50, 16, 2, 1, 1, 32, tied=True)
    init_weights_by_name(model, 1)
    assert dict(model.named_parameters(remove_duplicate=False)).keys() >= {"embedding.weight"}
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
