"""What a setting of an encoder-decoder recipe builds: the arms of their papers' comparisons."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from moekit.data.mixture import Constant, LinearHeating, SquareRootHeating, StepHeating
from moekit.errors import UserError
from moekit.layer import MoELayer
from moekit.recipes import deepspeed_moe, gshard, moe_lm, sparse_translation, st_moe, switch
from moekit.routers import (
    AllChoices,
    InputJitter,
    NoTokenLeftBehind,
    RandomChoice,
    SampledChoice,
    SampledSoftmax,
    ThresholdChoice,
    TopKRouter,
    presets,
)
from moekit.routing import Capacity
from moekit.runs import RunText
from moekit.runs.settings import DataConfig
from moekit.transformer import GLU, MLP


def network(module: ModuleType, **settings: Any) -> nn.Module:
    """The network of `tiny` with other settings."""
    tiny = module.RECIPE.variants["tiny"].config
    built = module.build(
        replace(tiny, model=replace(tiny.model, dim=16, heads=2, hidden_dim=24, **settings)), RunText(100)
    )
    found: nn.Module = built.backbone
    return found


def layers(module: ModuleType, **settings: Any) -> dict[str, MoELayer]:
    """Its sparse layers by name."""
    found = network(module, **settings).named_modules()
    return {name: part for name, part in found if isinstance(part, MoELayer)}


def routers(module: ModuleType, **settings: Any) -> list[TopKRouter]:
    return [layer.router for layer in layers(module, **settings).values() if isinstance(layer.router, TopKRouter)]


@pytest.mark.parametrize(
    ("module", "preset", "settings"),
    [
        (switch, presets.switch(16, 8), {}),
        (gshard, presets.gshard(16, 8), {}),
        (st_moe, presets.st_moe(16, 8), {}),
    ],
)
def test_default_routers_are_the_presets_named_after_the_papers(
    module: ModuleType, preset: TopKRouter, settings: dict[str, Any]
) -> None:
    made = routers(module, **settings)
    assert len(made) == 2
    for router in made:
        for name in (
            "k",
            "capacity",
            "renormalise",
            "second_expert",
            "exploration",
            "overflow",
            "balance",
            "scorer",
        ):
            assert getattr(router, name) == getattr(preset, name), name


def test_arms_of_switch() -> None:
    assert all(router.exploration == SampledSoftmax() for router in routers(switch, exploration="sample"))
    assert all(router.exploration is None for router in routers(switch, exploration="none"))
    rerouted = routers(switch, overflow="reroute", capacity_factor=1.0)
    assert all(router.overflow == NoTokenLeftBehind() and router.capacity.train == 1.0 for router in rerouted)
    assert all(router.exploration == InputJitter(1e-2) and router.overflow is None for router in routers(switch))
    torch.manual_seed(0)
    usual, small = network(switch), network(switch, init_scale=0.1, expert_init_scale=0.1)
    for path in ("encoder.layers.0.self_attention.qkv.weight", "encoder.layers.1.feed_forward.experts.w_out"):
        ratio = small.get_parameter(path).detach().std() / usual.get_parameter(path).detach().std()
        assert float(ratio) == pytest.approx(0.1**0.5, rel=0.1), path


def test_top_2_of_switch() -> None:
    """The paper's MoE-Base: two experts at the capacity that Switch has (table 1), and their twin of equal cost."""
    for router in routers(switch, k=2, capacity_factor=1.0, eval_capacity_factor=2.0):
        assert (router.k, router.renormalise, router.second_expert) == (2, "before_drop", RandomChoice(0.5))
        assert router.capacity == Capacity(train=1.0, eval=2.0, share="tokens")
    twin = network(switch, k=2, num_experts=0).encoder.layers[1].feed_forward  # type: ignore[union-attr, index]
    assert twin.w_out.in_features == 2 * 24


def test_arms_of_gshard() -> None:
    policies = {
        "random": RandomChoice(0.5),
        "always": AllChoices(),
        "threshold": ThresholdChoice(0.2),
        "sampled": SampledChoice(),
    }
    assert all(router.second_expert == RandomChoice(0.5) for router in routers(gshard))
    for name, policy in policies.items():
        made = routers(gshard, second_expert=name, eval_capacity_factor=1.5)
        assert all(router.second_expert == policy and router.capacity.eval == 1.5 for router in made)


def test_arms_of_moe_lm() -> None:
    assert all(router.second_expert == AllChoices() for router in routers(moe_lm))
    sampled = routers(moe_lm, second_expert="sampled", eval_capacity_factor=1.0)
    assert all(router.second_expert == SampledChoice() and router.capacity.eval == 1.0 for router in sampled)


@pytest.mark.parametrize(("half", "places"), [("both", [1, 3, 5, 7]), ("first", [1, 3]), ("second", [5, 7])])
@pytest.mark.parametrize("num_experts", [4, 0])
def test_halves_of_deepspeed_moe(half: str, places: list[int], num_experts: int) -> None:
    """Experts, or the twin's wider layers, in one half of the decoder or in both (section 4.1)."""
    made = network(deepspeed_moe, half=half, layers=8, num_experts=num_experts).decoder.layers  # type: ignore[union-attr]
    wide = [
        number
        for number, block in enumerate(made)  # type: ignore[arg-type]
        if (isinstance(block.feed_forward, MoELayer) if num_experts else block.feed_forward.w_out.in_features > 24)
    ]
    assert wide == places
    if num_experts:
        assert made[places[-1]].feed_forward.num_experts == 2 * num_experts  # type: ignore[index, union-attr]


def test_arms_of_st_moe() -> None:
    # Routers come in the order of their layers: the encoder's, then the decoder's.
    priorities = [router.capacity.priority for router in routers(st_moe, batch_prioritised=True)]
    assert priorities == ["probability", "position"]
    for k, weights in ((1, "none"), (3, "before_drop")):
        for router in routers(st_moe, k=k, capacity_factor=0.75, eval_capacity_factor=3.0, threshold=0.05):
            assert (router.k, router.renormalise, router.second_expert) == (k, weights, RandomChoice(0.05))
            assert router.capacity == Capacity(train=0.75, eval=3.0, share="tokens")
    assert all(router.capacity.share == "choices" for router in routers(st_moe, capacity_share="choices"))
    assert all(router.exploration == InputJitter(1e-2) for router in routers(st_moe, jitter=1e-2))
    biased = layers(st_moe, expert_bias="multiply").values()
    assert all(torch.equal(layer.experts.b_hidden, torch.ones(8, 24)) for layer in biased)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model\.gated true"):
        network(st_moe, expert_bias="add", gated=False)


def test_norms_without_scale_in_st_moe() -> None:
    """None of the RMS norms has a weight, the last ones included (arXiv:2202.08906 section 3)."""
    usual, plain = network(st_moe), network(st_moe, norm="rms_without_scale")
    names = {name for name, _ in usual.named_parameters()}
    left = {name for name, _ in plain.named_parameters()}
    assert names - left == {name for name in names if "norm.weight" in name}
    assert len(names - left) == 2 * 2 + 2 * 3 + 2 + 2  # encoder, decoder, extra feed-forwards, final norms


def test_published_variants_of_switch_and_st_moe_start_at_a_tenth() -> None:
    """Every matrix, by no depth (arXiv:2101.03961 section 2.4), as their READMEs say."""
    for module in (switch, st_moe):
        papers = [v.config.model for name, v in module.RECIPE.variants.items() if name.startswith("paper")]
        assert papers
        for model in papers:
            assert (model.init_scale, model.expert_init_scale, model.init_by_depth) == (0.1, 0.1, False)
        usual = module.RECIPE.variants["tiny"].config.model
        assert (usual.init_scale, usual.expert_init_scale, usual.init_by_depth) == (1.0, 1.0, True)


@pytest.mark.parametrize("extra", ["after", "before", "none"])
@pytest.mark.parametrize("num_experts", [8, 0])
def test_sparse_dense_blocks_of_st_moe_and_of_its_twin(extra: str, num_experts: int) -> None:
    for side in ("encoder", "decoder"):
        first, second = getattr(network(st_moe, extra=extra, num_experts=num_experts), side).layers
        assert first.extra is None
        assert (second.extra is None) == (extra == "none")
        if second.extra is not None:
            assert isinstance(second.extra, GLU)
            assert second.extra_order == extra
        if num_experts == 0:  # two experts' width
            assert second.feed_forward.w_out.in_features == 2 * 24


def test_arms_of_sparse_translation() -> None:
    begun = layers(sparse_translation, dense_steps=3)
    assert len(begun) == 2
    for layer in begun.values():
        assert layer.phase is not None
        assert layer.phase.active
        layer.on_step_end(3)
        assert not layer.phase.active
    assert all(layer.phase is None for layer in layers(sparse_translation, dense_steps=0).values())
    plain = sparse_translation.RECIPE.variants["tiny_sparse"].config
    assert (plain.model.dense_steps, plain.data.temperature_schedule()) == (0, Constant(1.0))
    assert plain.train == sparse_translation.TINY.train
    assert isinstance(network(sparse_translation, num_experts=0).encoder.layers[1].feed_forward, MLP)  # type: ignore[union-attr, index]


def test_forms_of_heating() -> None:
    hot = DataConfig(temperature=4.0, heating_steps=10)
    assert hot.temperature_schedule() == LinearHeating(1.0, 4.0, 10)
    assert replace(hot, heating="square_root").temperature_schedule() == SquareRootHeating(1.0, 10)
    assert replace(hot, heating="step").temperature_schedule() == StepHeating((1.0, 4.0), (10,))
    assert replace(hot, heating_steps=0).temperature_schedule() == Constant(4.0)


def test_heating_counts_optimizer_steps() -> None:
    """Of four batches each."""
    config = sparse_translation.RECIPE.variants["tiny"].config.changed(train={"accumulate": 4})
    given: dict[str, Any] = {}
    config.batches(make=lambda source, **options: given.update(options))  # type: ignore[arg-type]
    assert given["temperature"] == replace(config.data, heating_steps=4 * 800).temperature_schedule()


def test_sizes_of_single_babel_languages() -> None:
    source = DataConfig(babel_sentences=40, babel_sizes="kmb=20, shl=5").open()
    assert {code: len(source.monolingual(code, "train")) for code in source.languages} == {
        "avl": 40, "tnd": 40, "kmb": 20, "shl": 5,
    }  # fmt: skip
    for wrong in ("kmb", "kmb=", "kmb=many", "kmb=-3"):
        with pytest.raises(UserError, match="like kmb=2000"):
            DataConfig(babel_sizes=wrong).open()
    with pytest.raises(UserError, match="kmc"):
        DataConfig(babel_sizes="kmc=20").open()
