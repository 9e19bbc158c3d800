"""Numbers of a finished run by key, and what it cost: work, parameters, tokens and time."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.errors import UserError
from moekit.runs.run import MECHANISMS as MECHANISMS_FILE
from moekit.runs.run import SUMMARY
from moekit.stored import parse_json

MECHANISMS = (
    "routing.load_cv", "routing.load_max_ratio", "routing.dead_experts", "routing.drop_rate", "routing.entropy",
)  # fmt: skip
"""What is recorded of every sparse run, whatever its claims ask for."""

_TEST_LOSS = re.compile(r"test\.(.+)\.loss")
_OF_A_DOMAIN = ("loss", "above_test", "knowing", "guessing")
_MECHANISMS = "mechanisms"
"""What keys of mechanisms.json begin with."""

COSTS = ("work", "parameters", "active_parameters", "tokens")
"""What of a run's cost depends on no clock."""


def measure(folder: Path, key: str) -> float:
    """The number of a run with that key; of keys joined by " + " and " - ", their sum and difference.

    Args:
        folder: of the run.
        key: dotted, of summary.json, such as ``test.causal_lm.loss``, ``routing.layers.encoder.1.load_cv``,
            ``recall.causal_lm.known`` or, of agreement, ``recall.causal_lm.verb`` (share of the questions),
            ``floors.causal_lm.test.knowing`` or ``domains.NAME.causal_lm.above_test``; or the name of a column of
            metrics.csv, such as ``train/load_balance``, whose last value is taken; or ``mechanisms.`` and a key of
            mechanisms.json, such as ``mechanisms.valid.saturation`` or
            ``mechanisms.valid.mutual_information.language``, of runs with train.record_routing.

    Raises:
        UserError: the run has no such number; those of the nearest level are listed.
    """
    words = key.split()
    signs = dict(zip(range(0, len(words), 2), ["+", *words[1::2]], strict=False))
    if len(words) > 1 and len(words) % 2 and {*signs.values()} <= {"+", "-"}:
        return sum(measure(folder, words[at]) * (1 if sign == "+" else -1) for at, sign in signs.items())
    return _measure(folder, key)


def _measure(folder: Path, key: str) -> float:
    """That of one key."""
    values = _summary(folder)
    if key.startswith(f"{_MECHANISMS}."):
        values = {_MECHANISMS: _mechanisms(folder)}
    found, missed = _dig(values, key)
    if found is None and "/" in key:
        found = _last(folder / "metrics.csv", key)
    if isinstance(found, bool) or not isinstance(found, int | float):
        known = sorted(_numbers(values))
        near = [name for name in known if name.split(".")[0] == key.split(".")[0]] or known
        listed = ", ".join(near[:12]) + (", ..." if len(near) > 12 else "")
        raise UserError(f"{folder} has no number {key!r}{missed}. It has {listed}.")
    return float(found)


def floor_of(metric: str) -> str | None:
    """The key of what the text of a test costs a model that knows everything, for the key of a loss on it."""
    task = _TEST_LOSS.fullmatch(metric)
    return f"floors.{task[1]}.test.knowing" if task else None


def costs(folder: Path) -> dict[str, float | None]:
    """`COSTS` of a run: FLOPs of its training by the planner's arithmetic, parameters, and real tokens.

    The work of a model that the planner does not know is six operations a token and active parameter.
    """
    values = _summary(folder)
    parameters = values.get("parameters") or {}
    tokens, each = values.get("tokens"), (values.get("speed") or {}).get("flops_per_token")
    if each is None and parameters.get("active"):
        each = 6.0 * parameters["active"]
    return {
        "work": each * tokens if each and tokens else None,
        "parameters": parameters.get("total"),
        "active_parameters": parameters.get("active"),
        "tokens": tokens,
    }


def _summary(folder: Path) -> dict[str, Any]:
    try:
        found = parse_json((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SUMMARY} cannot be read ({error}). Delete {folder} to run it again.") from None
    return _by_name(found) if isinstance(found, dict) else {}


def _by_name(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with its lists as mappings: recall by task and kind, floors by task and split."""
    recall: dict[str, dict[str, Any]] = {}
    for of in summary.get("recall") or ():  # a task may have been asked for facts and, in other kinds, for agreement
        recall.setdefault(of["task"], {}).update({kind["kind"]: kind["recall"] for kind in of["kinds"]})
    floors: dict[str, dict[str, Any]] = {}
    for of in summary.get("floors") or ():
        floors.setdefault(of["task"], {})[of["split"]] = {name: of[name] for name in ("knowing", "guessing")}
    domains: dict[str, dict[str, Any]] = {}
    for of in summary.get("domains") or ():
        domains.setdefault(of["name"], {})[of["task"]] = {name: of[name] for name in _OF_A_DOMAIN}
    return {**summary, "recall": recall, "floors": floors, "domains": domains}


def _mechanisms(folder: Path) -> dict[str, Any]:
    """What was measured of the routing that a run has recorded."""
    try:
        found = parse_json((folder / MECHANISMS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / MECHANISMS_FILE} cannot be read ({error}): mechanisms are measured of sparse runs with "
            "train.record_routing and train.validate_every. Set both in the table."
        ) from None
    return found if isinstance(found, dict) else {}


def _dig(values: Any, key: str) -> tuple[Any, str]:
    """The value below a dotted key whose parts may have dots themselves; None, and why, where there is none."""
    if not isinstance(values, Mapping):
        return None, ""
    if key in values:
        return values[key], " (it is null)" if values[key] is None else ""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if (first := ".".join(parts[:length])) in values:
            return _dig(values[first], ".".join(parts[length:]))
    return None, ""


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"{prefix}{name}")
    return found


def _last(path: Path, column: str) -> float | None:
    """The last number in a column."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            values = [row[column] for row in csv.DictReader(file) if row.get(column)]
        return float(values[-1]) if values and math.isfinite(float(values[-1])) else None
    except (OSError, ValueError):
        return None
