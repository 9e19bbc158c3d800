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
from moekit.recipes import gshard, sparse_translation, st_moe, switch
from moekit.recipes._config import DataConfig
from moekit.recipes._data import open_sources, temperature
from moekit.routers import AllChoices, InputJitter, NoTokenLeftBehind, RandomChoice, SampledSoftmax, TopKRouter, presets
from moekit.transformer import GLU, MLP


def network(module: ModuleType, **settings: Any) -> nn.Module:
    """The network of `tiny` with other settings."""
    tiny = module.VARIANTS["tiny"]
    built = module.build(replace(tiny, model=replace(tiny.model, dim=16, heads=2, hidden_dim=24, **settings)), 100)
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
            "later_choices",
            "exploration",
            "overflow",
            "balance",
            "init_scale",
        ):
            assert getattr(router, name) == getattr(preset, name), name


def test_arms_of_switch() -> None:
    assert all(router.exploration == SampledSoftmax() for router in routers(switch, exploration="sample"))
    assert all(router.exploration is None for router in routers(switch, exploration="none"))
    rerouted = routers(switch, overflow="reroute", capacity_factor=1.0)
    assert all(router.overflow == NoTokenLeftBehind() and router.capacity.train == 1.0 for router in rerouted)
    assert all(router.exploration == InputJitter(1e-2) and router.overflow is None for router in routers(switch))
    torch.manual_seed(0)
    usual, small = (
        network(switch, init_scale=scale).encoder.layers[0].self_attention.qkv.weight.detach().std().item()  # type: ignore[union-attr, index]
        for scale in (1.0, 0.1)
    )
    assert small / usual == pytest.approx(0.1**0.5, rel=0.1)


def test_arms_of_gshard() -> None:
    assert all(router.later_choices == RandomChoice(0.5) for router in routers(gshard))
    assert all(router.later_choices == AllChoices() for router in routers(gshard, second_expert="always"))


def test_arms_of_st_moe() -> None:
    # Routers come in the order of their layers: the encoder's, then the decoder's.
    priorities = [router.capacity.priority for router in routers(st_moe, batch_prioritised=True)]
    assert priorities == ["probability", "position"]
    biased = layers(st_moe, expert_bias="multiply").values()
    assert all(torch.equal(layer.experts.b_hidden, torch.ones(8, 24)) for layer in biased)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model\.gated true"):
        network(st_moe, expert_bias="add", gated=False)


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
    plain = sparse_translation.VARIANTS["tiny_sparse"]
    assert (plain.model.dense_steps, temperature(plain.data)) == (0, Constant(1.0))
    assert plain.train == sparse_translation.TINY.train
    assert isinstance(network(sparse_translation, num_experts=0).encoder.layers[1].feed_forward, MLP)  # type: ignore[union-attr, index]


def test_forms_of_heating() -> None:
    hot = DataConfig(temperature=4.0, heating_steps=10)
    assert temperature(hot) == LinearHeating(1.0, 4.0, 10)
    assert temperature(replace(hot, heating="square_root")) == SquareRootHeating(1.0, 10)
    assert temperature(replace(hot, heating="step")) == StepHeating((1.0, 4.0), (10,))
    assert temperature(replace(hot, heating_steps=0)) == Constant(4.0)


def test_sizes_of_single_babel_languages() -> None:
    source = open_sources(DataConfig(babel_sentences=40, babel_sizes="kmb=20, shl=5"))
    assert {code: len(source.monolingual(code, "train")) for code in source.languages} == {
        "avl": 40, "tnd": 40, "kmb": 20, "shl": 5,
    }  # fmt: skip
    for wrong in ("kmb", "kmb=", "kmb=many", "kmb=-3"):
        with pytest.raises(UserError, match="like kmb=2000"):
            open_sources(DataConfig(babel_sizes=wrong))
    with pytest.raises(UserError, match="kmc"):
        open_sources(DataConfig(babel_sizes="kmc=20"))
