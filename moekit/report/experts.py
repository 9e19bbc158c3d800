"""Sections on the experts: who gets which tokens, and how routing fared over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moekit.report import page, plots, wording
from moekit.report.health import layer_health
from moekit.report.plots import Line, Unit
from moekit.report.run_folder import RunFolder, Series, loads
from moekit.report.series import milestones, smooth
from moekit.report.style import DIVERGING_LEVELS, diverging_class

_CAPTIONS: dict[str, tuple[str, str, str, Unit]] = {
    "entropy": (
        "Router entropy",
        "How undecided the routers are, in nats: 0 is certainty, log E is a coin with E sides.",
        "it is at log E to the end (nothing was learned) or drops to 0 at once (collapse).",
        "plain",
    ),
    "drop_rate": (
        "Drop rate",
        "Share of assignments that found their expert full and were skipped.",
        "it stays above a tenth: raise the capacity factor or the load-balancing weight.",
        "percent",
    ),
    "dead_experts": (
        "Dead experts",
        "Experts that got next to no token in the logged batches, all layers together.",
        "it is not zero after the first steps: those parameters are wasted.",
        "plain",
    ),
    "load_cv": (
        "Imbalance of load",
        "Standard deviation of the load over experts, divided by its mean; 0 is perfect balance.",
        "it grows: tokens crowd into few experts.",
        "plain",
    ),
    "load_max_ratio": (
        "Busiest expert",
        "Load of the busiest expert in fair shares, averaged over the layers; 1 is perfect balance.",
        "it stays above about 4: that expert is a bottleneck.",
        "plain",
    ),
    "experts_per_token": (
        "Experts per token",
        "How many experts a token used, on average; the fewer, the cheaper.",
        "it stays far from what the configuration aims at.",
        "plain",
    ),
    "load_balance": (
        "Load-balancing loss",
        "1 means tokens are spread evenly, the number of experts means that one takes all.",
        "it climbs away from 1.",
        "plain",
    ),
    "router_z": (
        "Router z-loss",
        "How large the routers' logits are; the penalty keeps them small and training stable.",
        "it grows without bound.",
        "plain",
    ),
}
_LOADS = ("dead_experts", "load_cv", "load_max_ratio")  # no cause for worry where a fixed rule decides
_PHASES = ("train", "valid", "test")
_CLASSES = [f"d{i}" for i in range(DIVERGING_LEVELS)]
_VISIBLE_TEXT = 8  # experts: with more, numbers do not fit into the cells
_NAMED_COLUMNS = 24


@dataclass(frozen=True)
class RoutingCurve:
    """A routing quantity over steps: overall, and of every layer that logs it."""

    quantity: str
    overall: Series | None
    layers: Mapping[str, Series]


def routing_curves(metrics: Mapping[str, Series]) -> list[RoutingCurve]:
    """The routing columns of metrics.csv, whatever path they were logged under.

    ``train/routing/drop_rate`` is overall; ``train/routing/encoder.1/drop_rate`` and
    ``encoder.layers.1.feed_forward.router/entropy`` belong to a layer. Training columns win over validation's.
    """
    overall: dict[str, tuple[int, Series]] = {}
    layers: dict[str, dict[str, tuple[int, Series]]] = {}
    for column, series in metrics.items():
        *scope, quantity = column.split("/")
        if quantity not in _CAPTIONS:
            continue
        rank = _PHASES.index(scope[0]) if scope and scope[0] in _PHASES else 0
        name = "/".join(s for s in scope if s not in (*_PHASES, "routing", "router", "moe", "aux"))
        into = layers.setdefault(quantity, {}) if name else overall
        key = name or quantity
        if key not in into or rank < into[key][0]:
            into[key] = (rank, series)
    return [
        RoutingCurve(q, overall[q][1] if q in overall else None, {n: s for n, (_, s) in layers.get(q, {}).items()})
        for q in _CAPTIONS
        if q in overall or q in layers
    ]


def experts(run: RunFolder) -> str:
    """Load of every expert by layer and by language, and the health of each layer."""
    health = layer_health(run)
    varies = any(x.fixed or x.experts_per_token is not None for x in health)
    lead = (
        f"In a Mixture-of-Experts layer a {'' if varies else 'small '}router sends each token to "
        f"{'some' if varies else 'one or two'} of E experts. A fair share is 1/E of the tokens. Colours are relative "
        "to it: grey is fair, orange more, blue less."
    )
    if not run.layers:
        dense = "This model is dense: it has no Mixture-of-Experts layer, so nothing is routed."
        why = dense if run.dense else run.notes.get("routing.json", "routing.json has no layer with a load.")
        return page.section("experts", "Experts", lead, page.note(why))
    figures = [_load_map(run), _health_table(run), _language_maps(run)]
    fixed = [x.name for x in health if x.fixed]
    rule = (
        f"A fixed rule, which nobody trains, assigns the tokens in {', '.join(fixed)}: an uneven load there comes "
        "from the text and is no failure of the router."
    )
    body = f'<div class="grid">{"".join(figures)}</div>'
    return page.section("experts", "Experts", lead, (page.note(rule) if fixed else "") + body)


def routing(run: RunFolder) -> str:
    """Entropy, drops, dead experts and router losses over time."""
    lead = (
        "How routing fared during training. Thin lines are single layers (blue encoder, orange decoder), the strong "
        "one is all of them."
    )
    figures = []
    health = layer_health(run)
    by_rule = bool(health) and all(x.fixed for x in health)
    for curve in routing_curves(run.metrics):
        title, see, worry, unit = _CAPTIONS[curve.quantity]
        worry = "" if by_rule and curve.quantity in _LOADS else worry
        lines = []
        sides: set[str] = set()
        for name, series in sorted(curve.layers.items()):
            side = "decoder" if "decoder" in name else "encoder" if "encoder" in name else "layers"
            label = "" if side in sides else side
            sides.add(side)
            colour = {"decoder": "red", "encoder": "blue"}.get(side, "muted")
            lines.append(Line(label, smooth(series), colour, "faint"))
        if curve.overall is not None:
            lines.append(Line("overall" if curve.layers else "", smooth(curve.overall), "ink"))
        if not any(len(line.series.value) for line in lines):
            continue
        table = {**({"overall": curve.overall} if curve.overall else {}), **dict(sorted(curve.layers.items()))}
        zero = curve.quantity in ("drop_rate", "dead_experts", "load_cv", "entropy")
        figures.append(
            page.figure(
                title,
                see,
                worry,
                plots.curves(lines, unit=unit, description=f"{title} over steps", start_at_zero=zero, height=2.2),
                table=_table(table),
            )
        )
    if not figures:
        if run.dense:
            return ""
        why = run.notes.get("metrics.csv", "No routing statistics were logged during this run.")
        return page.section("routing", "Routing over time", lead, page.note(why))
    return page.section("routing", "Routing over time", lead, f'<div class="grid">{"".join(figures)}</div>')


def _load_map(run: RunFolder) -> str:
    health = layer_health(run)
    most = max(x.num_experts for x in health)
    rows = []
    for layer, about in zip(run.layers, health, strict=True):
        rows.append((about.name, [_cell(share * about.num_experts) for share in loads(layer)]))
    html = page.heat(
        "layer",
        [str(i) for i in range(most)],
        rows,
        kind="dense" if most > 2 * _VISIBLE_TEXT else "",
        label_width="6rem",
    )
    return page.figure(
        "Load of every expert",
        "One row for each Mixture-of-Experts layer, one column for each expert; the number is its load in fair shares.",
        ""
        if all(x.fixed for x in health)
        else "a cell is strongly blue (an expert that hardly works) or orange (one that does the work of several).",
        html + _scale(),
    )


def _health_table(run: RunFolder) -> str:
    health = layer_health(run)
    used = any(x.experts_per_token is not None for x in health)
    rows = [
        (
            x.name,
            x.num_experts,
            *([wording.fixed(x.experts_per_token, 2)] if used else []),
            wording.fixed(x.evenness, 3),
            wording.fixed(x.load_cv, 2),
            wording.percent(x.drop_rate),
            wording.MISSING if x.fixed else x.dead,
            wording.fixed(x.router_entropy, 2),
            wording.fixed(x.specialisation, 2),
        )
        for x in health
    ]
    headers = ["layer", "experts", *(["per token"] if used else [])]
    headers += ["evenness", "imbalance", "dropped", "dead", "entropy", "special."]
    return page.figure(
        "Health of each layer",
        "Measured on held-out text. Evenness: 1 = all experts equally busy. Imbalance: spread of the load over its "
        "mean. Entropy: relative to log E. Special(isation): 0 = languages share all experts, 1 = they have their own."
        + (" Per token: how many experts a token used, on average." if used else ""),
        "" if all(x.fixed for x in health) else "evenness falls below 0.8, or an expert is dead.",
        page.table(headers, rows),
        wide=used,
    )


def _language_maps(run: RunFolder) -> str:
    given = run.routing.get("languages")
    languages = [str(x) for x in given] if isinstance(given, list) else []
    if len(languages) == 1:
        return ""  # it would be the load map again
    maps = []
    most = 0
    for layer, about in zip(run.layers, layer_health(run), strict=True):
        rows = {x: row for x in languages if len(row := loads(layer, x)) == about.num_experts}
        if not rows:
            continue
        order = _by_favourite(np.array(list(rows.values())))
        most = max(most, about.num_experts)
        cells = [(x, [_cell(row[e] * about.num_experts) for e in order]) for x, row in rows.items()]
        heat = page.heat(
            "expert",
            [str(e) for e in order] if about.num_experts <= _NAMED_COLUMNS else [""] * about.num_experts,
            cells,
            kind="dense" if about.num_experts > _VISIBLE_TEXT else "",
            label_width="3rem",
        )
        score = wording.fixed(about.specialisation, 2)
        maps.append(f"<div><h4>{page.text(about.name)}<span>specialisation {score}</span></h4>{heat}</div>")
    if not maps:
        return page.note("routing.json has no load by language.")
    width = _map_width(len(maps), most)
    return page.figure(
        "Which language goes to which expert",
        "One map for each layer: rows are languages, columns experts, ordered by the language that favours them most. "
        "Orange patches are experts that specialise in the languages of their rows; 1 is a fair share.",
        ""
        if all(x.fixed for x in layer_health(run))
        else "every map is grey in every layer (experts learned nothing about languages), or one column is orange in "
        "all rows (every language crowds into the same expert).",
        f'{_scale()}<div class="maps" style="--map:{width}px">{"".join(maps)}</div>',
        wide=True,
    )


def _map_width(maps: int, experts: int) -> int:
    """Least width of a map in pixels, so that rows of maps are full where the cells leave a choice."""
    widest = 4 if experts <= _VISIBLE_TEXT else 3 if experts <= 32 else 2
    columns = next((n for n in range(min(widest, maps), 1, -1) if maps % n == 0), min(widest, maps))
    return {1: 700, 2: 500, 3: 330, 4: 245}[columns]


def _by_favourite(shares: np.ndarray) -> list[int]:
    """Experts ordered by the language that favours them most, the keenest first."""
    relative = shares / np.maximum(shares.mean(0), 1e-12)
    return sorted(range(shares.shape[1]), key=lambda e: (int(relative[:, e].argmax()), -float(relative[:, e].max()), e))


def _cell(ratio: float) -> tuple[str, str]:
    return diverging_class(ratio), wording.fixed(ratio, 1) if ratio < 9.95 else wording.fixed(ratio, 0)


def _scale() -> str:
    return page.scale(_CLASSES, "\u00bc or less", "4 or more", "(middle: fair share)")


def _table(columns: Mapping[str, Series]) -> str:
    steps = milestones(list(columns.values())[:1])
    rows = []
    for step in steps:
        values = (float(s.value[np.abs(s.step - step).argmin()]) if len(s.step) else None for s in columns.values())
        rows.append((f"{step:,.0f}", *map(wording.significant, values)))
    return page.table(["step", *columns], rows)
