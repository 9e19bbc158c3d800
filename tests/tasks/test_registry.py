"""The registry: heads by name, and tasks on pairs on offer to every encoder-decoder recipe."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from moekit.cli.recipes import reconfigured
from moekit.errors import UserError
from moekit.runs.plain import as_plain
from moekit.runs.settings import TaskConfig, active_tasks
from moekit.tasks import TASKS, make_heads
from moekit.tasks.sequence import PairTask, SequenceHead

RECIPES = ("zcode_m3", "switch", "gshard", "st_moe", "sparse_translation")
PAIRS = [name for name, task in TASKS.items() if issubclass(task, PairTask)]


def test_heads_are_made_by_name() -> None:
    names = [name for name in TASKS if name != "replaced_token"]
    made = make_heads(names, 8, 0.25)
    assert [head.task for head in made] == names
    assert {head.label_smoothing for head in made if isinstance(head, SequenceHead)} == {0.25}
    with pytest.raises(UserError, match="replaced_token needs a generator"):
        make_heads(["replaced_token"], 8, 0.0)
    mine = make_heads(["translation"], 8, 0.0)[0]
    assert make_heads(["replaced_token"], 8, 0.0, {"replaced_token": lambda: mine}) == [mine]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("task", PAIRS)
def test_every_encoder_decoder_recipe_can_train_on_pairs(name: str, task: str) -> None:
    recipe = importlib.import_module(f"moekit.recipes.{name}").RECIPE
    config = recipe.variants["tiny"].config
    chosen = reconfigured(recipe, config, [f"--tasks.{task}.tokens", "512"])
    assert active_tasks(chosen.tasks)[task].tokens == 512
    assert set(active_tasks(chosen.tasks)) == {*active_tasks(config.tasks), task}
    assert recipe.config(as_plain(chosen), "here") == chosen


def test_a_task_on_offer_that_nobody_chose_is_in_no_file() -> None:
    recipe = importlib.import_module("moekit.recipes.switch").RECIPE
    config = recipe.variants["tiny"].config
    assert list(as_plain(config)["tasks"]) == ["span_corruption"]
    assert recipe.config(as_plain(config), "here") == config
    weighed = dataclasses.replace(config, tasks=dataclasses.replace(config.tasks, translation=TaskConfig(weight=2.0)))
    assert as_plain(weighed)["tasks"]["translation"] == {"weight": 2.0, "tokens": 0}
    assert recipe.config(as_plain(weighed), "here") == weighed


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_record_says_what_a_report_needs(task: type) -> None:
    record = task.record()  # type: ignore[attr-defined]
    assert set(record) == {"title", "explanation", "perplexity", "samples", "scores"}
    assert record["title"]
    assert record["explanation"].endswith(".")
    assert set(record["samples"]) == {"title", "lead", "source", "reference", "noun", "unknown"}
