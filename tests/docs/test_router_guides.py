"""The guides on routers: the script that compares them knows all of them and does what it says; fifteen lines are."""

from __future__ import annotations

import csv
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from script_module import module_of

from moekit import Router, routers

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "guides"
STEPS = 24


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with module_of(GUIDES / "compare_routers.py") as module:
        yield module


def presets() -> set[str]:
    """Public functions of moekit.routers that build a router."""
    functions = inspect.getmembers(routers, inspect.isfunction)
    returned = {name: typing.get_type_hints(function).get("return") for name, function in functions}
    return {name for name, cls in returned.items() if isinstance(cls, type) and issubclass(cls, Router)}


def classes() -> set[type]:
    """Public concrete routers."""
    found = {cls for _, cls in inspect.getmembers(routers, inspect.isclass) if issubclass(cls, Router)}
    return {cls for cls in found if not inspect.isabstract(cls)}


def test_the_script_knows_every_router(script: ModuleType) -> None:
    """Every preset by name; every class by name or through a preset of it."""
    entries = script.routers(script.text(2))
    named = {name.partition(",")[0] for name in entries}
    assert {"switch", "gshard"} <= presets()
    assert presets() <= named, "add a line for each to `routers` in docs/guides/compare_routers.py"
    built = {type(entry.router()) for entry in entries.values()}
    assert routers.TopKRouter in classes()
    assert classes() <= built, "add a line for each to `routers` in docs/guides/compare_routers.py"
    assert named <= set(routers.__all__), "an entry is named after what it shows"


def test_the_page_names_every_router() -> None:
    page = (GUIDES / "routers.md").read_text(encoding="utf-8")
    table = set(re.findall(r"`(\w+)`", page[page.index("## Which is which") :]))
    assert presets() <= table
    through_presets = {typing.get_type_hints(getattr(routers, name))["return"] for name in presets()}
    assert {cls.__name__ for cls in classes() - through_presets} <= table


@pytest.mark.slow
def test_it_trains_them_all_and_draws_four_panels(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.figure import Figure

    titles: list[str] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: object, **options: object) -> None:
        titles.extend(axes.get_title(loc="left") for axes in figure.axes)
        save(figure, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", savefig)
    picture = tmp_path / "routers.png"
    records = script.main(["--steps", str(STEPS), "--out", str(picture)])
    printed = capsys.readouterr().out

    assert list(records) == list(script.routers(script.text(2)))
    assert [title.split(",")[0].split(":")[0] for title in titles] == [
        "loss", "load", "active experts per token", "time per step",
    ]  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["routers.csv", "routers.png"]
    for name, record in records.items():
        assert len(record.loss) == len(record.imbalance) == len(record.active) == STEPS
        assert len(record.seconds) == 9
        assert record.final_loss < record.loss[0] - 0.8, f"{name} does not learn"
        assert record.milliseconds > 0
        assert min(record.imbalance) >= 1 - 1e-6
        assert name in printed

    with picture.with_suffix(".csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == STEPS * len(records)
    assert float(rows[-1]["loss"]) == pytest.approx(records[rows[-1]["router"]].loss[-1], rel=1e-4)


def test_what_the_page_says_of_them_is_so(script: ModuleType) -> None:
    """Few routers, a few dozen steps: the claims that need no statistics."""
    batches = script.text(STEPS)
    entries = script.routers(batches)
    records = {
        name: script.train(entries[name], batches).record
        for name in ("switch", "hash_oracle", "dense_to_sparse", "ExpertChoiceRouter", "UniformRouter")
    }
    assert records["hash_oracle"].final_loss < min(r.final_loss for n, r in records.items() if n != "hash_oracle") - 0.2
    assert records["dense_to_sparse"].active[0] > 4
    assert records["dense_to_sparse"].active[-1] == 1
    assert records["ExpertChoiceRouter"].active == [2.0] * STEPS
    for name in ("ExpertChoiceRouter", "UniformRouter"):
        assert max(records[name].imbalance) == pytest.approx(1.0)
    assert {name for name, record in records.items() if record.looks_ahead} == {"hash_oracle", "ExpertChoiceRouter"}


def test_all_begin_alike(script: ModuleType) -> None:
    """What is not the router starts from the same numbers, whatever the router drew before."""
    entries = script.routers(script.text(2))
    starts = []
    for name in ("switch", "noisy_topk", "UniformRouter"):
        named = script.SmallLM(entries[name]).named_parameters()
        starts.append({key: value for key, value in named if ".router." not in key})
    for other in starts[1:]:
        assert starts[0].keys() == other.keys()
        assert all(bool((starts[0][key] == value).all()) for key, value in other.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "0"], "--steps must be at least 1: got 0"), (["--only", "swich"], "no router is named like swich")],
)
def test_it_refuses(script: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err


def test_the_commands_of_the_page_are_understood(script: ModuleType, tmp_path: Path) -> None:
    page = (GUIDES / "routers.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python (docs/guides/\S+\.py)(.*)$", page, re.M)
    assert (ROOT / command[0]).is_file()
    arguments = command[1].split()
    arguments[arguments.index("--steps") + 1] = "1"
    arguments[arguments.index("--out") + 1] = str(tmp_path / "few.png")
    assert list(script.main([*arguments, "--only", "switch"])) == ["switch"]


def test_fifteen_lines_are_fifteen() -> None:
    """The class that the guide calls fifteen lines, without its docstring and empty lines."""
    page = (GUIDES / "own-router.md").read_text(encoding="utf-8")
    source = page[page.index("class NearestRouter") :]
    lines = [line for line in source[: source.index("```")].splitlines() if line.strip() and '"""' not in line]
    assert "in fifteen lines" in page
    assert len(lines) <= 15
