"""PageSection on the experts: who gets which tokens, and the health of each layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moekit.report import wording
from moekit.report.health import LayerHealth, by_rule, layer_health
from moekit.report.run_folder import RunFolder
from moekit.report.style import DIVERGING_LEVELS, diverging_class
from moekit.report.typical import typical_figure
from moekit.report.view import Figure, Heat, PageSection, Scale, Table, caption, heading

_SCALE = Scale([f"d{i}" for i in range(DIVERGING_LEVELS)], "\u00bc or less", "4 or more", "(middle: fair share)")
_HELD_OUT = "Measured on held-out text."
_VISIBLE_TEXT = 8  # experts: with more, numbers do not fit into the cells
_NAMED_COLUMNS = 24


def experts(run: RunFolder) -> PageSection:
    """Load of every expert by layer and by language, the health of each layer, and what experts like."""
    health = layer_health(run)
    fixed = [x.name for x in health if x.fixed]
    varies = any(x.fixed or x.experts_per_token is not None for x in health)
    notes = []
    if fixed:
        notes.append(
            f"A fixed rule, which nobody trains, assigns the tokens in {', '.join(fixed)}: an uneven load there comes "
            "from the text and is no failure of the router."
        )
    elif run.dense:
        notes.append("This model is dense: it has no Mixture-of-Experts layer, so nothing is routed.")
    elif not health:
        notes.append(run.notes.get("routing.json", "routing.json has no layer with a load."))
    worry, figures = not by_rule(run), []
    if health:
        table = health_table(run)
        used = " Per token: how many experts a token used, on average." if "per token" in table.headers else ""
        figures = [
            Figure(*caption("load", worry=worry), heats=[_load_map(health)], scale=_SCALE, name="load"),
            Figure(
                *caption("health", worry=worry, used=used, measured=run.routing.get("measured", _HELD_OUT)),
                table=table,
                wide=bool(used),
            ),
        ]
    if (
        health and "measured" not in run.routing and len(run.languages) != 1
    ):  # of one language it would be the load map again
        if maps := [_language_map(x) for x in health if x.by_language]:
            width = _map_width(len(maps), max(x.num_experts for x in health if x.by_language))
            explained = caption("language_maps", worry=worry)
            figures.append(
                Figure(*explained, heats=maps, scale=_SCALE, map_width=width, wide=True, name="load_by_language")
            )
        else:
            notes.append("routing.json has no load by language.")
    if health and (liked := typical_figure(run)) is not None:
        figures.append(liked)
    words = {"router": "router", "number": "some"} if varies else {"router": "small router", "number": "one or two"}
    return PageSection(*heading("experts", **words), notes, [[figure] for figure in figures])


def health_table(run: RunFolder) -> Table:
    """One row for each Mixture-of-Experts layer."""
    health = layer_health(run)
    used = any(x.experts_per_token is not None for x in health)
    headers = ["layer", "experts", *(["per token"] if used else [])]
    headers += ["evenness", "imbalance", "dropped", "dead", "entropy", "special."]
    rows = [
        (
            x.name,
            str(x.num_experts),
            *([wording.fixed(x.experts_per_token, 2)] if used else []),
            wording.fixed(x.evenness, 3),
            wording.fixed(x.load_cv, 2),
            wording.percent(x.drop_rate),
            wording.MISSING if x.fixed else str(x.dead),
            wording.fixed(x.router_entropy, 2),
            wording.fixed(x.specialisation, 2),
        )
        for x in health
    ]
    return Table(headers, rows, "Experts")


def _load_map(health: Sequence[LayerHealth]) -> Heat:
    most = max(x.num_experts for x in health)
    rows = [(x.name, [_cell(v * x.num_experts) for v in x.load]) for x in health]
    return Heat("layer", [*map(str, range(most))], rows, "dense" if most > 2 * _VISIBLE_TEXT else "", "6rem")


def _language_map(layer: LayerHealth) -> Heat:
    size = layer.num_experts
    order = _by_favourite(np.array([*layer.by_language.values()]))
    return Heat(
        "expert",
        [str(e) if size <= _NAMED_COLUMNS else "" for e in order],
        [(name, [_cell(row[e] * size) for e in order]) for name, row in layer.by_language.items()],
        "dense" if size > _VISIBLE_TEXT else "",
        "3rem",
        title=layer.name,
        remark=f"specialisation {wording.fixed(layer.specialisation, 2)}",
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
    return diverging_class(ratio), wording.fixed(ratio, 1 if ratio < 9.95 else 0)
