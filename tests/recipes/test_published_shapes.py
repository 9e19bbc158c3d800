"""Published models have their published sizes, and dense twins the cost of what they are compared with.

A new recipe adds its published variants to PUBLISHED; a variant named ``paper...`` that is not there fails.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import nn

import moekit.recipes
from moekit.component import components
from moekit.planner.census import parameters
from moekit.planner.measure import flop_counter
from moekit.routing import Capacity, Router
from moekit.runs import RunText
from moekit.transformer.embedding import TokenEmbedding

NAMES = sorted(info.name for info in pkgutil.iter_modules(moekit.recipes.__path__) if not info.name.startswith("_"))


Counted = Literal["total", "active", "inside"]
"""All parameters; those that one token passes; or all but the tables that embed tokens and make logits."""


class Published(NamedTuple):
    """What a paper says about a model's size."""

    recipe: str
    variant: str
    billions: float
    tolerance: float
    source: str
    counted: Counted = "total"


SHAZEER = "arXiv:1701.06538 appendix C, quoted from memory"
PUBLISHED = [
    Published("switch", "paper_base_64", 3.8, 0.01, "arXiv:2101.03961"),
    Published("switch", "paper_base_128", 7.4, 0.01, "arXiv:2101.03961"),
    Published("switch", "paper_base_256", 14.7, 0.01, "arXiv:2101.03961"),
    Published("switch", "paper_large", 26.3, 0.01, "arXiv:2101.03961"),
    Published("switch", "paper_c", 1571, 0.001, "arXiv:2101.03961; arXiv:2202.08906 table 11"),
    Published("switch", "paper_xxl", 395, 0.005, "arXiv:2101.03961; arXiv:2202.08906 table 11"),
    # Round numbers, 3 to 7 % below what the sizes make.
    Published("gshard", "paper_12b", 12.5, 0.07, "arXiv:2006.16668 section 4"),
    Published("gshard", "paper_37b", 37, 0.07, "arXiv:2006.16668 section 4"),
    Published("gshard", "paper_50b", 50, 0.04, "arXiv:2006.16668 section 4"),
    Published("gshard", "paper_150b", 150, 0.04, "arXiv:2006.16668 section 4"),
    Published("gshard", "paper_200b", 200, 0.04, "arXiv:2006.16668 section 4"),
    Published("gshard", "paper_600b", 600, 0.04, "arXiv:2006.16668 section 4"),
    Published("gshard", "paper_dense_96", 2.3, 0.01, "arXiv:2006.16668 section 4"),
    Published("st_moe", "paper_l", 4.1, 0.01, "arXiv:2202.08906 table 11"),
    Published("st_moe", "paper_32b", 269, 0.001, "arXiv:2202.08906 table 11"),
    Published("moe_lm", "paper_15b", 15, 0.04, "arXiv:2112.10684 table 1"),
    Published("moe_lm", "paper_52b", 52, 0.01, "arXiv:2112.10684 table 1"),
    Published("moe_lm", "paper_207b", 207, 0.01, "arXiv:2112.10684 table 1"),
    Published("moe_lm", "paper_1t", 1100, 0.01, "arXiv:2112.10684 table 1"),
    Published("zcode_m3", "paper", 10, 0.03, "arXiv:2109.10465"),
    *(  # to the last printed digit
        Published("shazeer", f"paper_moe_{variant}", millions / 1e3, 0.05 / millions, SHAZEER, "inside")
        for variant, millions in {
            "4": 8.4,
            "32": 37.8,
            "256": 272.9,
            "256_h": 272.9,
            "1024_h": 1079.0,
            "4096_h": 4303.4,
            "34m": 4313.9,
            "143m": 4371.1,
        }.items()
    ),
    Published("hash_layers", "paper_1x64", 0.751, 0.001, "arXiv:2106.04426; depth chosen so"),
    Published("hash_layers", "paper_1x128", 1.28, 0.007, "arXiv:2106.04426; depth chosen so"),
    Published("base_layers", "paper", 44, 0.01, "arXiv:2103.16716"),
    Published("dense_to_sparse", "paper_1b5", 1.5, 0.03, "arXiv:2112.14397; experts chosen so"),
    Published("deepspeed_moe", "paper_125m_moe_64", 0.125, 0.02, "arXiv:2201.05596: its dense base", "active"),
    Published("deepspeed_moe", "paper_350m_moe_128", 13, 0.02, "arXiv:2201.05596"),
    Published("deepspeed_moe", "paper_350m_pr_moe", 4, 0.03, "arXiv:2201.05596"),
    Published("deepspeed_moe", "paper_1b3_moe_128", 52, 0.01, "arXiv:2201.05596"),
    Published("deepspeed_moe", "paper_1b3_pr_moe", 31, 0.013, "arXiv:2201.05596"),
    Published("deepspeed_moe", "paper_1b3_mos", 27, 0.005, "arXiv:2201.05596"),
]


def recipe(name: str) -> ModuleType:
    return importlib.import_module(f"moekit.recipes.{name}")


def configs(name: str) -> dict[str, Any]:
    """The settings of every variant."""
    return {name: variant.config for name, variant in recipe(name).RECIPE.variants.items()}


def network(name: str, config: Any, vocab_size: int | None = None) -> nn.Module:
    """The network of a configuration."""
    return recipe(name).build(config, RunText(vocab_size or config.data.vocab_size)).backbone


def billions(name: str, config: Any, counted: Counted = "total") -> float:
    with torch.device("meta"):
        built = network(name, config)
    if counted == "inside":
        tables = (module for module in built.modules() if isinstance(module, TokenEmbedding))
        return (parameters(built)["total"] - sum(table.weight.numel() for table in tables)) / 1e9
    return parameters(built)[counted] / 1e9


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.recipe}-{row.variant}")
def test_published_sizes(row: Published) -> None:
    built = billions(row.recipe, recipe(row.recipe).RECIPE.variants[row.variant].config, row.counted)
    assert built == pytest.approx(row.billions, rel=row.tolerance), row.source


@pytest.mark.parametrize("name", NAMES)
def test_no_published_model_is_left_out(name: str) -> None:
    """A variant of the paper's has a row above, and every row a variant."""
    papers = {variant for variant in recipe(name).RECIPE.variants if variant.startswith("paper")}
    assert papers == {row.variant for row in PUBLISHED if row.recipe == name}


def test_where_sources_disagree_one_reading_makes_the_published_count() -> None:
    """The readings that the recipes name and do not build: what they would make."""
    switch, st_moe = recipe("switch"), recipe("st_moe")
    xxl, large = switch.RECIPE.variants["paper_xxl"].config, switch.RECIPE.variants["paper_large"].config
    other = replace(xxl, model=replace(xxl.model, num_experts=64, every=4))
    assert billions("switch", other) == pytest.approx(106.1, rel=1e-3)
    other = replace(large, model=replace(large.model, hidden_dim=2816, gated=True, activation="gelu"))
    assert billions("switch", other) == pytest.approx(27.1, rel=0.005)
    for variant, without, with_extra in (("paper_l", 4.06, 4.16), ("paper_32b", 268.6, 272.3)):
        config = st_moe.RECIPE.variants[variant].config
        deep = replace(config.model, encoder_layers=27, decoder_layers=27)
        assert billions("st_moe", replace(config, model=replace(deep, extra="none"))) == pytest.approx(
            without, rel=1e-3
        )
        assert billions("st_moe", replace(config, model=deep)) == pytest.approx(with_extra, rel=1e-3)


def test_parts_that_papers_name() -> None:
    """Shares of a model that are published beside its size."""
    variants = {name: configs(name) for name in ("base_layers", "hash_layers", "deepspeed_moe", "moe_lm")}
    base = variants["base_layers"]["paper"]
    none = replace(base, model=replace(base.model, num_experts=1))
    expert = (billions("base_layers", base) - billions("base_layers", none)) / 127
    assert expert == pytest.approx(0.335, abs=0.001)
    assert billions("base_layers", none) - expert == pytest.approx(1.3, abs=0.01)
    small = replace(base, model=replace(base.model, expert_hidden_dim=0))  # 8,096, as printed
    assert billions("base_layers", small) - billions("base_layers", base) == pytest.approx(-0.5, abs=0.05)
    larger = variants["hash_layers"]["paper_1x128"]
    share = billions("hash_layers", larger, "active") / billions("hash_layers", larger)
    assert share == pytest.approx(0.17, abs=0.005)
    eleven = variants["hash_layers"]["paper_1x64"]
    eleven = replace(eleven, model=replace(eleven.model, layers=11))
    assert billions("hash_layers", eleven) == pytest.approx(0.675, abs=0.001)
    for variant, dense in (("paper_350m_moe_128", 0.35), ("paper_1b3_moe_128", 1.3)):
        active = billions("deepspeed_moe", variants["deepspeed_moe"][variant], "active")
        assert active == pytest.approx(dense, rel=0.02)
    evo = recipe("dense_to_sparse").RECIPE.variants["paper_1b5"].config
    sixteen = replace(evo, model=replace(evo.model, num_experts=16))
    assert billions("dense_to_sparse", sixteen) == pytest.approx(1.86, abs=0.01)


def flops(model: nn.Module, ids: torch.Tensor) -> tuple[int, int]:
    """Operations of one forward in evaluation, dropless, where schedules end: of everything, and of routers alone."""
    model.eval()
    for component in components(model).values():
        component.on_step_end(10**9)
    for module in model.modules():
        if isinstance(module, Router) and hasattr(module, "capacity"):
            module.capacity = Capacity()
    with flop_counter() as counter, torch.no_grad():
        if hasattr(model, "encode"):
            model.decode(ids, model.encode(ids).hidden)  # type: ignore[operator]
        else:
            model.decode(ids)  # type: ignore[operator]
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    return counter.get_total_flops(), sum(n for name, n in counts.items() if name.split(".")[-1] == "router")


@pytest.mark.parametrize("variant", ["tiny", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_dense_twins_cost_the_same(name: str, variant: str) -> None:
    """A token of the sparse model passes what it passes in the twin, but for the router's own scores."""
    variants = configs(name)
    if variant not in variants:
        assert variant != "tiny", f"{name} must have a variant tiny"
        pytest.skip(f"{name} has no variant {variant}")
    ids = torch.randint(100, 200, (2, 32), generator=torch.Generator().manual_seed(0))
    sparse, routers = flops(network(name, variants[variant], 200), ids)
    twin, none = flops(network(name, variants[f"{variant}_dense"], 200), ids)
    assert none == 0
    assert sparse - routers == twin


def test_the_counter_sees_a_twin_that_is_too_wide() -> None:
    """The test above can fail: experts of twice the width do not cost what the twin costs."""
    tiny = recipe("switch").RECIPE.variants["tiny"].config
    wide = replace(tiny, model=replace(tiny.model, hidden_dim=2 * tiny.model.hidden_dim))
    ids = torch.randint(100, 200, (2, 32), generator=torch.Generator().manual_seed(0))
    sparse, routers = flops(network("switch", wide, 200), ids)
    assert (
        sparse - routers > flops(network("switch", recipe("switch").RECIPE.variants["tiny_dense"].config, 200), ids)[0]
    )
