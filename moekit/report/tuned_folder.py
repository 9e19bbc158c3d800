"""The folder of a fine-tuning of a folder of transformers, said as a run is: one task, no test, counts of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moekit.report.run_folder import RunFolder, Series, dig, loads, names_in, number

TASK = "learned_tokens"
"""The name of what is learned."""

_TASK = {
    "title": "Learned tokens",
    "explanation": "The loss of the tokens that are learned, without what routers add to it.",
    "perplexity": True,
}
_ROUTING, _WRAPPED = "train/routing/", "model."
_MEASURED = "Measured in training, all steps together."


def as_run(folder: RunFolder, results: Mapping[str, Any]) -> RunFolder:
    """What results.json and the columns of metrics.csv say, under the names that a run has for it.

    Args:
        folder: what was read of the folder.
        results: results.json.
    """
    metrics = {_column(name): series for name, series in folder.metrics.items()}
    before, after, steps = (number(results, name) for name in ("before", "after", "steps"))
    held_out = metrics.get(f"valid/{TASK}/loss", Series(np.empty(0), np.empty(0)))
    ends = [(0.0, before), *([(steps, after)] if steps is not None else [])]
    metrics[f"valid/{TASK}/loss"] = _with(held_out, {step: loss for step, loss in ends if loss is not None})
    summary: dict[str, Any] = {}
    if after is not None and steps is not None:
        summary = {
            "steps": int(steps),
            "tasks": {TASK: _TASK},
            "loss": {TASK: after},
            "perplexity": {TASK: math.exp(after)} if after < 700 else {},
            "before": before,
            "parameters": results.get("parameters"),
            "tokens": _largest(metrics, "train/tokens"),
            "peak_memory": {"bytes": _largest(metrics, "train/peak_memory")},
            "held_out": {"remarks": [*_worse(before, after), *map(str, _listed(results.get("warnings")))]},
            "folder": Path(str(folder.settings.get("model", ""))).name,
            "data": folder.settings.get("data"),
        }
    tokens = results.get("expert_tokens")
    layers = [_layer(name, dig(tokens, name), metrics) for name in names_in(tokens)]
    if summary and (shares := [np.array(loads(layer)) for layer in layers if loads(layer)]):
        summary["routing"] = {"load_cv": float(np.mean([share.std() * len(share) for share in shares]))}
    notes = dict(folder.notes)
    if not layers:
        notes["routing.json"] = "Tokens of every expert are counted in results.json, when training has ended."
    return replace(
        folder,
        metrics=metrics,
        summary=summary,
        routing={"layers": layers, "measured": _MEASURED} if layers else {},
        notes=notes,
        tuned=True,
    )


def _column(name: str) -> str:
    """As runs call it: losses by task, and layers by their paths in the model of transformers."""
    if name in ("train/loss", "valid/loss"):
        phase, _, quantity = name.partition("/")
        return f"{phase}/{TASK}/{quantity}"
    layer = name.removeprefix(_ROUTING)
    return _ROUTING + layer.removeprefix(_WRAPPED) if layer != name else name


def _with(series: Series, points: Mapping[float, float]) -> Series:
    """With points in their places."""
    both = {**dict(zip(series.step.tolist(), series.value.tolist(), strict=True)), **points}
    steps = sorted(both)
    return Series(np.array(steps, dtype=np.float64), np.array([both[step] for step in steps], dtype=np.float64))


def _largest(metrics: Mapping[str, Series], name: str) -> float | None:
    values = metrics[name].finite.value if name in metrics else np.empty(0)
    return float(values.max()) if len(values) else None


def _worse(before: float | None, after: float) -> Iterator[str]:
    if before is not None and after >= before:
        yield f"The held-out loss did not fall: {before:.4f} before training, {after:.4f} after it."


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _layer(name: str, counts: Any, metrics: Mapping[str, Series]) -> dict[str, Any]:
    """As in routing.json; what routers logged is of the last point."""
    said = {quantity: metrics.get(f"{_ROUTING}{name}/{quantity}") for quantity in ("entropy", "drop_rate")}
    last = {quantity: series.last for quantity, series in said.items() if series is not None}
    return {"name": name, "load": counts, **{quantity: value for quantity, value in last.items() if value is not None}}
