"""A result as a Markdown page and a drawing, made of its JSON alone."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.atomic import replacing, write_json, write_text
from moekit.report.style import COLOURS, CYCLE, Canvas
from moekit.shell import NAME
from moekit.wording import counted, table_cell

MISSING = "\u2013"
"""Where there is no number."""
_MOST_PANELS = 4


def write_result(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write TABLE.json, TABLE.md and TABLE.svg; returns their paths.

    Raises:
        UserError: they cannot be written.
    """
    name = found["table"].rpartition("/")[2]
    page, picture = markdown(found), drawing(found)
    paths = [folder / f"{name}{suffix}" for suffix in (".json", ".md", ".svg")]
    write_json(paths[0], found)
    write_text(paths[1], page)
    with replacing(paths[2]) as file:
        file.write(picture)
    return paths


def markdown(found: Mapping[str, Any]) -> str:
    """The page of a result."""
    name = found["table"].rpartition("/")[2]
    parts = [
        f"# {found['title']}",
        f"{NAME} ablate {found['table']}: recipe `{found['recipe']}`, variant `{found['variant']}`, "
        f"{counted(len(found['seeds']), 'seed')}. Written by that command from `{name}.json`.",
        *(_claim(claim) for claim in found["claims"]),
        _control(found["control"]),
        "## Arms",
        _arms(found),
        _matched(found),
        _rates(found["learning_rates"]),
        _fine_tuning_rates(found.get("fine_tuning_rates")),
        "## Runs",
        _runs(found),
        f"![Every run of the claims' metrics]({name}.svg)",
        _made(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def value_words(value: float | None) -> str:
    """A number with four significant digits, not in powers of ten where that can be read."""
    if value is None:
        return MISSING
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"


def ours(claim: Mapping[str, Any]) -> str:
    """What was measured, in a few words: the difference, or the number, with its interval."""
    if claim["difference"] is None:
        return MISSING
    low, high = claim["interval"]
    sign = "" if claim["kind"] == "compute factor" or not claim["against"] else "+"
    for bound, pairs in claim.get("bounds", {}).items():
        if pairs == claim["pairs"]:  # what varies is the bound, so that an interval says nothing
            return f"{bound} {claim['difference']:.4g}"
    some = "".join(f", {bound} in {pairs} pairs" for bound, pairs in claim.get("bounds", {}).items())
    return f"{claim['difference']:{sign}.4g} [{low:{sign}.4g}, {high:{sign}.4g}]{some}"


def asked(claim: Mapping[str, Any]) -> str:
    """What is compared, and what the claim says of it."""
    metric = f"`{claim['metric']}`"
    if claim["kind"] == "compute factor":
        return f"work of the dense model with the {metric} of {claim['arm']}, over its own, above {claim['smallest']:g}"
    metric = f"distance of {metric} from its median over seeds" if claim["kind"] == "spread" else metric
    what = f"{metric} of {claim['arm']}" + (f" minus {claim['against']}" if claim["against"] else "")
    if claim["kind"] == "no difference":
        return f"{what}, within ±{claim['smallest']:g}"
    if claim["kind"] == "mechanism":
        return f"{what}, {'above' if claim['direction'] == 'higher' else 'below'} {claim['bound']:g}"
    return f"{what}, {claim['direction']} by more than {claim['smallest']:g}"


def _claim(claim: Mapping[str, Any]) -> str:
    words = (claim["claim"] or claim["hypothesis"]).rstrip(".")
    where = f" ({', '.join(filter(None, [claim['paper'], claim['section']]))})" if claim["paper"] else ""
    published = f" The paper: {claim['published'].rstrip('.')}." if claim["published"] else ""
    p, adjusted = claim["p"], claim["adjusted_p"]
    tested = "" if p is None else f"; p = {p:.2g}, adjusted for the table {adjusted:.2g}"
    lines = [
        f"## {claim['id']}: {claim['verdict']}\n",
        f"{words}{where}.{published}\n",
        f"- Written before the run: {claim['hypothesis']}",
        f"- Asked: {asked(claim)}.",
        f"- Measured: {ours(claim)} over {counted(claim['pairs'], 'pair')} of runs, 95 % interval in brackets{tested}.",
        f"- Verdict: **{claim['verdict']}**: {claim['why']}",
    ]
    if claim["not_matched"]:
        lines.append(f"- Not matched: {'; '.join(claim['not_matched'])}.")
    return "\n".join(lines)


def _control(control: Mapping[str, Any]) -> str:
    if "none" in control:
        return f"## Negative control\n\nNone: {control['none']}"
    return (
        f"## Negative control: {'holds' if control['verdict'] == 'reproduced' else 'does not hold'}\n\n"
        f"{control['hypothesis']}\n\n- Asked: {asked(control)}.\n"
        f"- Measured: {ours(control)} over {counted(control['pairs'], 'pair')} of runs. {control['why'].capitalize()}"
    )


def _arms(found: Mapping[str, Any]) -> str:
    rows = []
    for name, arm in found["arms"].items():
        settings = ", ".join(f"{key} {value}" for key, value in arm["settings"].items())
        taken = [
            f"{group}.{key} {value}"
            for group in ("aggregate", "fine_tune", "distill")
            for key, value in arm.get(group, {}).items()
        ]
        pruned = ", ".join(f"{key} {value}" for key, value in (arm["prune"] or {}).items())
        parts = {
            f"{_how(arm)} {arm['of']}": arm["of"],
            ", ".join(taken): taken,
            f"pruned: {pruned}": pruned,
            settings: settings,
            f"seeds + {arm['seed_offset']}": arm["seed_offset"],
            f"order + {arm.get('order_offset')}": arm.get("order_offset"),
        }
        settings = ", ".join(words for words, there in parts.items() if there)
        cost, minutes = arm["costs"], found["made"]["minutes_by_arm"].get(name)
        rows.append(
            [
                name, arm["about"], settings or MISSING, f"{arm['learning_rate']:g}", _big(cost["work"], 1e12),
                f"{_big(cost['parameters'], 1e6)} / {_big(cost['active_parameters'], 1e6)}",
                _big(cost["tokens"], 1e6), value_words(minutes and round(minutes, 2)),
            ]
        )  # fmt: skip
    headers = [
        "arm", "what it is", "settings", "learning rate", "training, TFLOP", "parameters / active, M", "tokens, M",
        "processor minutes",
    ]  # fmt: skip
    return table_of(headers, rows)


def _how(arm: Mapping[str, Any]) -> str:
    """What an arm does with the models of another."""
    if "given_as" in arm:
        return f"{arm['given_as']} is the run of"
    return "fine-tuned of" if "fine_tune" in arm else "taught by" if "distill" in arm else "models of"


def _matched(found: Mapping[str, Any]) -> str:
    matched = found["matched"]
    return f"Matched: {', '.join(matched)}." if matched else "Nothing is matched across arms by design."


def _rates(grid: Mapping[str, Any] | None) -> str:
    if grid is None:
        return "All arms train at the settings' own learning rate."
    return _tried("Learning rates", grid)


def _fine_tuning_rates(grid: Mapping[str, Any] | None) -> str:
    return "" if grid is None else _tried("Learning rates of fine-tuning", grid)


def _tried(what: str, grid: Mapping[str, Any]) -> str:
    """What each rate came to."""
    rates = [repr(rate) for rate in sorted(grid["values"])]
    rows = [
        [
            arm,
            *(value_words(_mean(got["tried"][rate])) for rate in rates),
            f"{got['chosen']:g}{' (at the edge of the grid)' if got['on_edge'] else ''}",
        ]
        for arm, got in grid["arms"].items()
    ]
    seeds = ", ".join(map(str, grid["seeds"]))
    return f"{what}, by `{grid['metric']}` of seeds {seeds}:\n\n" + table_of(["arm", *rates, "chosen"], rows)


def _runs(found: Mapping[str, Any]) -> str:
    metrics = _metrics(found)
    rows = [
        [
            name,
            str(seed),
            run["state"] + (f": {run['said']}" if run.get("said") else ""),
            *(value_words(run["metrics"].get(metric)) for metric in metrics),
        ]
        for name, arm in found["arms"].items()
        for seed, run in arm["runs"].items()
    ]
    return table_of(["arm", "seed", "state", *(f"`{metric}`" for metric in metrics)], rows)


def _made(found: Mapping[str, Any]) -> str:
    made = found["made"]
    where = made["environment"]
    named = [commit[:10] + "+" * commit.endswith("+") for commit in made["commits"]]
    commits = f", {_several(made)} {', '.join(named)}" if named else ""
    commits += " (+: files were changed since)" if any(name.endswith("+") for name in named) else ""
    return (
        f"{made['minutes']:.0f} processor minutes in all, one thread a run, on {where['machine']} with Python "
        f"{where['python']} and torch {where['packages']['torch']}; moekit {where['moekit']}"
        f"{commits}."
    )


def _several(made: Mapping[str, Any]) -> str:
    return "commits" if len(made["commits"]) > 1 else "commit"


# -- the drawing -------------------------------------------------------------------------------------------------------


def drawing(found: Mapping[str, Any]) -> bytes:
    """Every run of the metrics of the claims: a mark for a run, a line through those of a seed, a bar at the mean."""
    panels = _panels(found)
    with Canvas(2.4 * len(panels)) as canvas:
        canvas.figure.delaxes(canvas.axes)
        for place, (metric, arms) in enumerate(panels, start=1):
            axes = canvas.figure.add_subplot(len(panels), 1, place)
            columns = [
                {seed: run["metrics"].get(metric) for seed, run in found["arms"][arm]["runs"].items()} for arm in arms
            ]
            for seed in map(str, found["seeds"]):
                line = [(x, column[seed]) for x, column in enumerate(columns) if column.get(seed) is not None]
                if line:
                    axes.plot(
                        *zip(*line, strict=True), "o-", color=COLOURS["muted"], alpha=0.5, markersize=3, linewidth=0.7
                    )
            for x, column in enumerate(columns):
                known = [value for value in column.values() if value is not None]
                if known:
                    colour = COLOURS[CYCLE[x % len(CYCLE)]]
                    axes.hlines(statistics.fmean(known), x - 0.25, x + 0.25, color=colour, linewidth=2.5)
            axes.set_xticks(range(len(arms)), arms)
            axes.set_xlim(-0.5, len(arms) - 0.5)
            axes.set_ylabel(metric)
        return _svg(canvas, found["table"])


def _svg(canvas: Canvas, salt: str) -> bytes:
    """The same bytes for the same numbers."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        canvas.figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _panels(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Metrics and the arms that claims ask them of, in the order of the table."""
    wanted: dict[str, set[str]] = {}
    for claim in found["claims"]:
        wanted.setdefault(claim["metric"], set()).update(claim["means"])
    return [(metric, [arm for arm in found["arms"] if arm in arms]) for metric, arms in wanted.items()][:_MOST_PANELS]


def _metrics(found: Mapping[str, Any]) -> list[str]:
    control = [] if "none" in found["control"] else [found["control"]]
    return list(dict.fromkeys(claim["metric"] for claim in [*found["claims"], *control]))


# -- words -------------------------------------------------------------------------------------------------------------


def link_to(result: Mapping[str, Any]) -> str:
    """A link from docs/ to the page of a result."""
    recipe, _, name = result["table"].partition("/")
    return f"[`{NAME} ablate {result['table']}`](../recipes/{recipe}/results/ablations/{name}.md)"


def table_of(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(table_cell(cell) for cell in row) + " |" for row in cells)


def _big(value: float | None, unit: float) -> str:
    return MISSING if value is None else f"{value / unit:.3g}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
