"""Every recipe runs with one command, and everything that its README and its YAML files say works.

Recipes are found in the package, commands in the ``bash`` blocks of ``recipes/*/README.md``, overlays by their suffix:
a new one is tested without a line here, but for NUM_YAML. Commands run as written, in order, in an empty folder;
models, text and steps are made small by options behind theirs. In a README

- FOLDER and FOLDER1 are folders with train.en, train.de, valid.en, ... ; FOLDER2 holds JSON lines;
- a file given with --input is made if it is not there;
- a published model is shown with --print_config, not trained.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import itertools
import json
import pkgutil
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moekit.recipes
import moekit.report
from moekit.ablation.plan import Plan
from moekit.ablation.table import read_table, table_files
from moekit.cli import recipes as command_lines
from moekit.cli.recipes import build_parser, main, reconfigured, reconfigured_by_all
from moekit.data.sources import open_source
from moekit.runs import Recipe
from moekit.runs.plain import as_plain, flatten
from moekit.runs.settings import active_tasks
from moekit.runs.settings.fields import check_ranges
from moekit.shell import command_line
from moekit.source import Direction
from moekit.training.multitask import MultitaskModule

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(info.name for info in pkgutil.iter_modules(moekit.recipes.__path__) if not info.name.startswith("_"))
YAML = sorted(path.relative_to(ROOT) for path in ROOT.glob("recipes/*/*.y*ml"))
NUM_YAML = 14
TABLES = table_files()
STATEFUL = {
    "sparse_translation": ["--model.dense_steps", "3", "--data.heating_steps", "10"],
    "dense_to_sparse": [],
}
"""Recipes whose routers or layers change with the steps, and what makes them change in a few."""

SIZES = {
    "dim": 16, "heads": 2, "head_dim": 0, "hidden_dim": 32, "num_experts": 4, "generator_dim": 8,
}  # fmt: skip
SETTINGS = {
    "data.vocab_size": 400, "data.max_length": 40, "data.babel_sentences": 300, "data.num_workers": 0,
    "train.max_steps": 3, "train.warmup_steps": 1, "train.log_every": 1, "train.validate_every": 2,
    "train.precision": "32-true", "train.accelerator": "cpu",
    "evaluate.beam_size": 1, "evaluate.max_sentences": 4, "evaluate.valid_sentences": 4, "evaluate.samples": 1,
}  # fmt: skip


def recipe(name: str) -> Recipe:
    found: Recipe = importlib.import_module(f"moekit.recipes.{name}").RECIPE
    return found


def tiny(config: Any, given: list[str], cache: Path) -> list[str]:
    """Options that make a run small, those left out that a command gives itself."""
    model = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model)}
    options: dict[str, Any] = {f"model.{key}": value for key, value in SIZES.items() if model.get(key)}
    options |= SETTINGS | {"data.cache": cache}
    if not config.data.babel_sizes and not config.data.directions:  # which name more of them
        options["data.babel_languages"] = 2
    options |= {f"tasks.{task}.tokens": 128 for task in active_tasks(config.tasks)}
    named = {word.split("=")[0].removeprefix("--") for word in given if word.startswith("--")}
    return [word for key, value in options.items() if key not in named for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Text for README commands: two languages in plain files, and in JSON lines."""
    plain, lines = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("lines")
    babel = open_source("babel", None, languages=2, train_sentences=300)
    for split, name in (("train", "train"), ("valid", "valid"), ("test", "test")):
        pairs = list(babel.parallel(Direction("avl", "tnd"), split))[:300]  # type: ignore[arg-type]
        for code, side in (("en", 0), ("de", 1)):
            text = "".join(pair[side] + "\n" for pair in pairs)
            (plain / f"{name}.{code}").write_text(text, encoding="utf-8")
        rows = [json.dumps({"translation": {"en": a, "de": b}}) + "\n" for a, b in pairs]
        (lines / f"{name}.json").write_text("".join(rows), encoding="utf-8")
    return {"FOLDER": plain, "FOLDER1": plain, "FOLDER2": lines}


# -- a recipe without arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_tests_and_reports(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`moekit run NAME` with nothing but a smaller model and budget."""
    monkeypatch.chdir(tmp_path)
    found = recipe(name)
    assert next(iter(found.variants)) == "tiny"
    config = found.default
    assert main(found, tiny(config, [], cache)) == 0
    out = tmp_path / "runs" / f"{name}-tiny"
    wanted = {"config.yaml", "environment.json", "metrics.csv", "summary.json", "samples.json", "routing.json"}
    assert wanted | {"report.html", "checkpoints"} <= {path.name for path in out.iterdir()}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == SETTINGS["train.max_steps"]
    translates = "translation" in active_tasks(config.tasks)
    assert (summary["bleu"] is not None) == translates
    assert translates or set(summary["test"]) == set(active_tasks(config.tasks))
    assert summary["routing"]["layers"]
    for loss in summary["loss"].values():
        assert 0 < loss < 20


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short_and_its_default_is_brief(name: str) -> None:
    """Under 200 lines, and an end in minutes: six with the test, on two cores (zcode_m3: twelve)."""
    path = ROOT / "moekit" / "recipes" / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 200
    train = recipe(name).variants["tiny"].config.train
    assert train.max_steps > 0
    assert 0 < train.max_minutes <= (11 if name == "zcode_m3" else 5)


@pytest.mark.parametrize("name", NAMES)
def test_variants_have_notes_and_twins(name: str) -> None:
    found = recipe(name)
    assert {"tiny", "tiny_dense"} <= set(found.variants)
    for variant in found.variants.values():
        assert variant.note
        check_ranges(variant.config)
        variant.config.train.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_in_the_lists(name: str) -> None:
    """In the table of the README and in that of the guide."""
    assert f"| [`{name}`](recipes/{name}/README.md) |" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in (ROOT / "docs" / "guides" / "recipes.md").read_text(encoding="utf-8")


# -- stop and resume -----------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """What ends a run in its middle."""


@pytest.mark.parametrize("name", STATEFUL)
def test_a_stopped_run_with_state_resumes_step_for_step(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedules and phases of routers and layers are where they were, and every loss the same to the last digit."""
    found = recipe(name)
    options = ["--train.max_steps", "12", "--train.checkpoint_steps", "4", "--train.validate_every", "0"]
    options += STATEFUL[name]
    options += tiny(found.variants["tiny"].config, options, cache)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(found, ["fit", *options, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        step = MultitaskModule.training_step

        def until_six(self: MultitaskModule, *arguments: Any) -> torch.Tensor:
            if self.global_step == 6:
                raise StoppedError
            result: torch.Tensor = step(self, *arguments)
            return result

        patch.setattr(MultitaskModule, "training_step", until_six)
        with pytest.raises(StoppedError):
            main(found, ["fit", *options, "--out", str(stopped)])
    assert len(losses(stopped)) < 12
    assert main(found, ["fit", *options, "--out", str(stopped), "--resume"]) == 0
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == 12


def losses(out: Path) -> dict[str, str]:
    with (out / "metrics.csv").open(newline="") as file:
        return {row["step"]: row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


# -- README and YAML -----------------------------------------------------------------------------------------------


def commands(readme: Path) -> list[str]:
    """The recipe commands in the bash blocks of a page, continued lines joined."""
    found, inside = [], False
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line.strip() == "```bash"
        elif inside and line.startswith("moekit "):
            found.append(line.split("#")[0].strip())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_the_readme_work(
    name: str,
    cache: Path,
    folder: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # Reports of such runs are looked at above; here they would take a third of the time.
    monkeypatch.setattr(moekit.report, "write_report", lambda folder: None)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    found = commands(ROOT / "recipes" / name / "README.md")
    assert found, f"recipes/{name}/README.md shows no command"
    for command in found:
        words = shlex.split(command)
        assert words[2] == name, command
        argv = [",".join(str(folder.get(part, part)) for part in w.split(",")) for w in [words[1], *words[3:]]]
        assert execute(recipe(name), argv, cache) == 0, f"{command}\n{capsys.readouterr().err}"


def execute(found: Recipe, argv: list[str], cache: Path) -> int | str | None:
    """Run a command with a small budget; its exit code."""
    if {"--help", "--print_config"} & set(argv):
        with pytest.raises(SystemExit) as done:
            main(found, argv)
        return done.value.code
    if argv and not argv[0].startswith("-") and argv[0] not in ("run", "fit"):
        for option, file in itertools.pairwise(argv):
            if option == "--input" and not Path(file).exists():
                Path(file).write_text("ta ko\nro ti na\n", encoding="utf-8")
        return main(found, argv)
    values = dict(itertools.pairwise(argv))
    variant = values.get("--variant", next(iter(found.variants)))
    argv = [*argv, "--evaluate.samples", "0"]
    argv += tiny(found.variants[variant].config, argv, cache)
    if values.get("--data.source") == "gettext":  # this machine's catalogs, which it may not have
        build_parser(found, "run", variant).parse_args(argv[1:])
        return 0
    return main(found, [*argv, "--overwrite"])


@pytest.mark.parametrize("name", NAMES)
def test_single_settings_are_applied_as_by_the_parser_of_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting of the last variant, given to the first one."""
    first, *_, last = (variant.config for variant in recipe(name).variants.values())
    given = flatten(as_plain(last))
    options = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    obvious = reconfigured_by_all(recipe(name), first, options)
    monkeypatch.delattr(command_lines, "build_parser")
    made = reconfigured(recipe(name), first, options)
    assert made == obvious == last
    assert json.dumps(as_plain(made)) == json.dumps(as_plain(obvious))  # 1 is no 1.0 in the name of a run


@pytest.mark.parametrize("path", YAML, ids=str)
def test_yaml_loads_and_changes_something(path: Path) -> None:
    found = recipe(path.parts[1])
    variant = next(iter(found.variants))
    default = build_parser(found, "run", variant).parse_args([])
    changed = build_parser(found, "run", variant).parse_args(["--config", str(ROOT / path)])
    for values in (default, changed):
        values.pop("config", None)
    assert changed.as_dict() != default.as_dict()


ARMS = [
    (table, arm)
    for table, path in TABLES.items()
    for number, (arm, made) in enumerate(read_table(path).arms.items())
    if not made.of and not made.seed_offset and (made.settings or number == 0)
]


# A table with a result has been run. Tried are one of each recipe and those without a result, but for those of the
# variant that every recipe trains above.
RESULTS = {f"{path.parents[2].name}/{path.stem}" for path in (ROOT / "recipes").glob("*/results/ablations/*.json")}
WANTED = [table for table in TABLES if not table.endswith("/plain")]
TRIED = {*{table.partition("/")[0]: table for table in WANTED}.values(), *(set(WANTED) - RESULTS)}
FIRST = {table: next(arm for of, arm in ARMS if of == table) for table in TRIED}


@pytest.mark.parametrize(
    ("table", "arm"),
    [
        pytest.param(table, arm, id=f"{table}-{arm}", marks=[pytest.mark.slow] * (arm != FIRST.get(table)))
        for table, arm in ARMS
    ],
)
def test_an_arm_of_a_table_trains(table: str, arm: str, cache: Path, tmp_path: Path) -> None:
    """A few steps, with a finite loss."""
    job = Plan.of(read_table(TABLES[table]), reconfigured).job(arm, 1)
    if job.config.data.missing_paths():
        pytest.skip("its text is not part of the checkout")
    settings = tmp_path / "arm.yaml"
    settings.write_text(yaml.safe_dump(as_plain(job.config)), encoding="utf-8")
    options = ["--config", str(settings), "--out", str(tmp_path / "run"), "--train.validate_every", "0"]
    options += ["--train.record_routing", "0"]  # which is done in validations
    options += ["--evaluate.samples", str(job.config.evaluate.samples)]  # an oracle has none
    options += tiny(job.config, options, cache)
    assert main(recipe(job.recipe), ["fit", *options]) == 0
    values = [float(value) for value in losses(tmp_path / "run").values()]
    assert len(values) == SETTINGS["train.max_steps"]
    assert all(0 < value < 20 * max(1, len(active_tasks(job.config.tasks))) for value in values)  # the sum of all tasks


def test_the_stability_study_has_its_rows() -> None:
    """Of its README, which says what the paper measured."""
    page = (ROOT / "recipes/st_moe/README.md").read_text(encoding="utf-8")
    table = read_table(TABLES["st_moe/stability"])
    arms = [arm for arm, made in table.arms.items() if not made.seed_offset]
    assert len(arms) == 7
    assert all(f"| `{arm}` |" in page for arm in arms)


def test_every_yaml_is_found() -> None:
    """The number of files, so that a pattern that finds none cannot pass."""
    assert len(YAML) == NUM_YAML


def test_the_package_says_which_recipes_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = importlib.import_module("moekit.recipes.__main__").main
    monkeypatch.setattr("sys.argv", ["moekit.recipes"])
    assert start() == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in NAMES)
    monkeypatch.setattr("sys.argv", ["moekit.recipes", "switch", "--help"])
    assert start() == 2
    assert command_line("run", "switch", "--help") in capsys.readouterr().err
