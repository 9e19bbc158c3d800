"""A table as a file: found, read strictly, resolved to settings, and refused in one line before anything is run."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from small_tables import TABLE, changed, write_table

from moekit.ablation.plan import Plan
from moekit.ablation.result import read_result
from moekit.ablation.session import KEPT, results_folder
from moekit.ablation.table import RECIPES, find_table, read_table, table_files
from moekit.cli.recipes import reconfigured
from moekit.errors import UserError


def plan(folder: Path, **parts: Any) -> Plan:
    return Plan.of(read_table(write_table(folder, changed(**parts))), reconfigured)


CLAIM: dict[str, Any] = TABLE["claims"][0]
CONTROL: dict[str, Any] = TABLE["control"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"titel": "x"}, r"table\.yaml: titel: unknown key\. Did you mean 'title'"),
        ({"title": None}, r"title: is missing: text"),
        ({"recipe": "swich"}, r"recipe must be a known one: got 'swich'. Did you mean 'switch'\?"),
        ({"variant": "tine"}, r"variant: unknown variant 'tine'\. Did you mean 'tiny'"),
        ({"seeds": [1, 1]}, r"seeds: must be different whole numbers from 0: got \[1, 1\]"),
        ({"seeds": [1.5]}, r"seeds: must be different whole numbers"),
        ({"minutes": 0}, r"minutes: must be a number, greater than 0: got 0"),
        ({"matched": ["weight"]}, r"matched: must be one of work, parameters, tokens, time: got 'weight'"),
        ({"learning_rates": {"values": [1, 1], "seeds": [9], "metric": "m"}}, r"_rates\.values: must be different"),
        ({"learning_rates": {"values": [1], "seeds": [2], "metric": "m"}}, r"_rates\.seeds: must be other seeds"),
        ({"arms": {}}, r"arms: must have at least one arm"),
        ({"arms": {"many": 3}}, r"arms\.many: must be a mapping: got 3"),
        ({"arms": {"many": {"setting": {}}}}, r"arms\.many\.setting: unknown key\. Did you mean 'settings'"),
        ({"arms": {"many": {"of": "none"}}}, r"arms\.many\.of: must name an arm that trains from scratch: got 'none'"),
        ({"arms": {"many": {"prune": {"keep": 2}}}}, r"arms\.many\.prune: is for an arm"),
        ({"claims": []}, r"claims: a table needs at least one claim"),
        ({"claims": [CLAIM, CLAIM]}, r"claims\[1\]\.id: 'many-better' is there twice"),
        ({"claims": [CLAIM | {"arm": "mny"}]}, r"claims\.many-better: unknown arm 'mny'\. Did you mean 'many'"),
        ({"claims": [CLAIM | {"kind": "worse"}]}, r"claims\[0\]\.kind: must be one of better"),
        ({"claims": [CLAIM | {"hypothesis": " "}]}, r"claims\[0\]\.hypothesis: must be text: got nothing"),
        ({"claims": [CLAIM | {"smallest": -1}]}, r"claims\[0\]\.smallest: must be a number, 0 or more: got -1"),
        ({"claims": [{k: v for k, v in CLAIM.items() if k != "direction"}]}, r"claims\[0\]\.direction: is missing"),
        ({"claims": [CLAIM | {"bound": 1}]}, r"claims\[0\]\.bound: unknown key"),
        ({"claims": [CLAIM | {"kind": "within checkpoint"}]}, r"both arms must be of the same trained models"),
        ({"control": CONTROL | {"smallest": 0}}, r"control\.smallest: must be a number, greater than 0: got 0"),
        ({"control": None}, r"control: give a negative control, or say under `no_control`"),
        ({"no_control": "why"}, r"control: give a negative control, or say"),
        ({"settings": {"model.dmi": 3}}, r"table\.yaml: settings: .*model\.dmi"),
        ({"settings": {"model.dim": 3, "model": {"dim": 4}}}, r"settings: model\.dim is there twice"),
        ({"settings": {"model": {"dim": 16, "heads": 3}}}, r"arms\.many\.settings: .*divisible by heads"),
        ({"arms": TABLE["arms"] | {"few": {"settings": {"train.learning_rate": -1}}}}, r"arms\.few\.settings: .*rate"),
        ({"arms": TABLE["arms"] | {"few": {"settings": {"train.seed": 4}}}}, r"train\.seed is given by the seeds"),
        ({"settings": {"train.max_steps": 20, "data.order_seed": 4}}, r"settings: data\.order_seed is given"),
        ({"arms": TABLE["arms"] | {"again": {"seed_offset": 1}}}, r"must lead to other seeds .*\[2, 3, 4, 5\]"),
        ({"arms": TABLE["arms"] | {"again": {"seed_offset": 100}}},
         r"again\.seed_offset: must lead to other seeds than those of learning_rates, .*\[101, 102\]"),
        ({"arms": TABLE["arms"] | {"too": {"seed_offset": 1001}}},
         r"too\.seed_offset: must lead to other seeds than those of again, .*\[1002, 1003, 1004, 1005\]"),
        ({"arms": TABLE["arms"] | {"kept": {"of": "many", "settings": {"train.max_steps": 9}}}},
         r"kept\.settings\.train\.max_steps: is of training, which an arm that evaluates .* does not do"),
        ({"arms": TABLE["arms"] | {"kept": {"of": "many", "settings": {"model.num_experts": 4}}}},
         r"arms\.kept\.of: the model of many: the network must be that of the run it starts from: "),
        ({"settings": {"data.path": datetime.date(2024, 1, 1)}},
         r"settings\.data\.path: must be text, .*of which YAML makes a date\. Put it in quotes"),
        ({"arms": TABLE["arms"] | {"cut": {"of": "many", "prune": {4: "keep"}}}},
         r"arms\.cut\.prune: must have names as keys: got 4\. Put it in quotes"),
        ({"arms": TABLE["arms"] | {f"dense{n}": {"settings": {"model.num_experts": 0, "model.dropout": n / 10}}
                                   for n in range(4)},
          "claims": [{"id": "work", "kind": "compute factor", "hypothesis": "h", "metric": "test.causal_lm.loss",
                      "arm": "many", "ladder": [f"dense{n}" for n in range(4)], "smallest": 2.0}]},
         r"claims\.work\.ladder: must have 4 or more arms of different work: dense0, .* are of 1\."),
        ({"arms": TABLE["arms"] | {"again": {"seed_offset": 9.5}}}, r"seed_offset: must be a whole number: got 9\.5"),
        ({"claims": [CLAIM | {"against": "many"}]}, r"many-better\.against: must name another arm than `arm`"),
        ({"claims": [CLAIM | {"kind": "spread"}], "seeds": [1, 2]}, r"many-better: a spread needs 3 seeds .* got 2\.$"),
        ({"claims": [CLAIM | {"arm": "mny"}]}, r"There are: again, few, many\.$"),
        ({"settings": {"train.max_steps": 0, "train.max_minutes": 2}}, r"train\.max_steps must be given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_tables_are_refused_in_one_line(parts: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as refused:
        plan(tmp_path, **parts)
    assert str(tmp_path / "table.yaml") in str(refused.value)


def test_a_ladder_has_four_sizes(tmp_path: Path) -> None:
    factor = {
        "id": "f", "kind": "compute factor", "hypothesis": "h", "metric": "m", "arm": "many", "smallest": 1.0,
    }  # fmt: skip
    for ladder, said in ((["few", "again"], "must name 4 or more arms: got 2"), (["few"] * 4, "got 1")):
        with pytest.raises(UserError, match=said):
            plan(tmp_path, claims=[factor | {"ladder": ladder}])
    arms = {name: {} for name in ("a", "b", "c", "d", "many")}
    claims = [factor | {"ladder": list("abcd"), "smallest": 0}]
    with pytest.raises(UserError, match=r"smallest: must be a factor above 0: got 0"):
        plan(tmp_path, arms=arms, claims=claims, control=None, no_control="none")


def test_pairs_differ_by_the_arm_alone(tmp_path: Path) -> None:
    """Same seed, same order of the text, first weights by name; no clock ends a run."""
    made = plan(tmp_path)
    many, few, again = (
        made.job(arm, 3, {"many": 0.002, "few": 0.002, "again": 0.002}) for arm in ("many", "few", "again")
    )
    assert many.config == few.config.changed(model={"num_experts": many.config.model.num_experts})
    for job in (many, few):
        assert (job.config.train.seed, job.config.data.order_seed) == (3, 3)
        assert (job.config.train.init_by_name, job.config.train.max_minutes) == (True, 0)
        assert job.config.train.learning_rate == 0.002
    assert (again.config.train.seed, again.config.data.order_seed) == (1003, 1003)
    assert again.config.data.seed == many.config.data.seed, "of the same corpus"


def test_a_run_is_named_by_what_it_computes(tmp_path: Path) -> None:
    made = plan(tmp_path)
    other = plan(
        tmp_path / "other",
        title="Another",
        arms={"x": {}, "y": {"settings": {"data.cache": "elsewhere"}}},
        claims=[CLAIM | {"arm": "x", "against": "y"}],
        control=CONTROL | {"arm": "x", "against": "y"},
    )
    digest = made.job("many", 1).digest
    assert other.job("x", 1).digest == digest, "tables share runs"
    assert other.job("y", 1).digest == digest, "a cache changes no number"
    different = [made.job("many", 2), made.job("few", 1), made.job("again", 1), made.job("many", 1, {"many": 0.01})]
    assert len({digest, *(job.digest for job in different)}) == 5
    assert {job.kin for job in different if job.label.startswith(("many", "again"))} == {made.job("many", 1).kin}


def test_nested_and_dotted_settings_are_the_same(tmp_path: Path) -> None:
    nested = plan(tmp_path, settings={"model": {"dim": 16, "heads": 2}, "train": {"max_steps": 20, "warmup_steps": 4}})
    dotted = plan(
        tmp_path,
        settings={"model.dim": 16, "model.heads": 2, "train.max_steps": 20, "train": {"warmup_steps": 4}},
    )
    assert nested.configs == dotted.configs
    assert nested.configs["many"].model.dim == 16


def test_tables_are_found_by_name_and_path(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    one = write_table(recipes / "moe_lm" / "ablations", name="size")
    write_table(recipes / "switch" / "ablations", name="both")
    write_table(recipes / "moe_lm" / "ablations", name="both")
    assert list(table_files(recipes)) == ["moe_lm/both", "moe_lm/size", "switch/both"]
    for name in ("size", "moe_lm/size", str(one)):
        assert find_table(name, recipes) == one
    for name, said in (
        ("both", "a table of several recipes: give one of moe_lm/both, switch/both"),
        ("moe_lm/sise", "Did you mean 'moe_lm/size'"),
        ("none.yaml", "there is no such file"),
    ):
        with pytest.raises(UserError, match=said):
            find_table(name, recipes)
    with pytest.raises(UserError, match=r"which this installation has not\. Give the path of a table"):
        find_table("size", tmp_path / "wheel")


def test_the_folder_names_the_recipe(tmp_path: Path) -> None:
    path = write_table(tmp_path / "recipes" / "switch" / "ablations", changed(recipe=None))
    assert read_table(path).recipe == "switch"


@pytest.mark.parametrize("name", table_files())
def test_committed_tables_can_be_run(name: str) -> None:
    """Their settings exist and fit together."""
    made = Plan.of(read_table(table_files()[name]), reconfigured)
    assert made.table.name == name
    long = made.table.minutes > 15  # hours for the table: three pairs then
    assert len(made.table.seeds) >= (3 if long else 5)
    trained = [job for job in made.jobs({}) if job.of is None]
    assert len(trained) >= len(made.table.seeds)


BEFORE_RUNS_WERE_KEPT = {"moe_lm/equal_arms", "moe_lm/evaluation_capacity", "shazeer/balance_losses"}


MEASURED = {
    name: file for name, path in table_files().items() if (file := results_folder(path) / f"{path.stem}.json").is_file()
}
"""The results of the tables that have one."""


@pytest.mark.parametrize("name", sorted(MEASURED.keys() - BEFORE_RUNS_WERE_KEPT))
def test_runs_of_a_committed_result_are_kept_under_their_names(name: str) -> None:
    """Else a new setting, or another name of a run, would have all that is committed made again."""
    file = MEASURED[name]
    made, found = Plan.of(read_table(table_files()[name]), reconfigured), read_result(file)
    grids = [found.get(grid) or {"arms": {}} for grid in ("learning_rates", "fine_tuning_rates")]
    rates = {arm: float(tried["chosen"]) for grid in grids for arm, tried in grid["arms"].items()}
    jobs = [*made.tuning_jobs(), *made.fine_tuning_jobs(rates), *made.jobs(rates)]
    lost = [job.label for job in jobs if not (file.parent / KEPT / f"{job.recipe}-{job.digest}.json").is_file()]
    assert not lost, f"{len(lost)} of {len(jobs)}: {lost[:3]}"


def test_tables_are_there() -> None:
    """So that a pattern that finds none cannot pass."""
    assert RECIPES.is_dir()
    assert len(table_files()) >= 4
    assert len(MEASURED) >= 4
