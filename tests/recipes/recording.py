"""What a run leaves in its folder as plain values, the machine that computed it, and how two such records compare."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from moekit.runs.recipe import find_recipe

CLOCK = re.compile(
    r"second|minute|memory|bytes|signature|flops|train/grad_norm|train/routing/[^/]+/(?!drop_rate|entropy|experts_per_token)"
)
"""Names of values that depend on the clock, on what else runs, or on a package's version; and the norm of gradients and
what is watched of every layer, which are younger than the records.
"""
LOSS = re.compile(r"\bloss\b")
"""Names of the values that are compared on other machines too."""
MAX_SHOWN = 12
LATER = ("tasks", "scores", "held_out", "majority", "chance", "copied", "ending", "speed")
"""Keys of summary.json, and of the tasks in its test, that are younger than the records: words for reports, scores of
tasks that they lack, what guessing and copying would score, where training ended, and how fast it was.
"""


def machine() -> dict[str, str]:
    """What the last digits of a computation depend on: processor, the vector instructions that torch uses, torch."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    said = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    known = said.get("flags", said.get("Features", "")).split()
    flags = sorted(flag for flag in known if re.match(r"sse|avx|fma|amx|sv|asimd", flag))
    return {
        "processor": said.get("model name", platform.processor()),
        "flags": " ".join(flags),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def read_folder(folder: Path) -> dict[str, Any]:
    """What is recorded of a run folder: the only place that knows names of its files."""

    def data(name: str) -> Any:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if not CLOCK.search(name)} for row in csv.DictReader(file)]
    samples = [
        {name: text for name, text in sample.items() if not name.endswith("_gloss")}  # younger than the records
        for sample in data("samples.json") or []
    ]
    whole = json.dumps(samples, sort_keys=True, ensure_ascii=False)
    return {
        "config": yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
        "metrics": [",".join(rows[0]), *(",".join(row.values()) for row in rows)],
        "summary": data("summary.json"),
        "routing": data("routing.json"),
        "samples": {
            "sha256": hashlib.sha256(whole.encode()).hexdigest(),
            "hypotheses": [sample["hypothesis"] for sample in samples],
        },
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """As JSON in which a row of the metrics is a line."""
    parts = [
        f"{json.dumps(name)}: {json.dumps(value, indent=0 if name == 'metrics' else None, ensure_ascii=False)}"
        for name, value in record.items()
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any], *, exact: bool, tolerance: float) -> list[str]:
    """A line for each value that differs: its step and name, and both values.

    Args:
        recorded: a record.
        found: another.
        exact: whether all values must be the same to the last digit; else losses may differ by `tolerance`, other
            computed values by anything, and only settings and names must be the same.
        tolerance: relative.
    """
    old, new = values(_as_now(recorded)), values(_without_later(_as_now(found)))
    lines = [f"{name}: {old[name]!r} recorded, missing now" for name in old if name not in new]
    lines += [f"{name}: not recorded, {new[name]!r} now" for name in new if name not in old]
    for name in old:
        if name in new and not _same(name, old[name], new[name], exact, tolerance):
            lines.append(f"{name}: {old[name]!r} recorded, {new[name]!r} now")
    return lines


def _as_now(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record whose settings have their present names and forms; the values are the record's."""
    config = recorded.get("config")
    if not isinstance(config, Mapping):
        return recorded
    return {**recorded, "config": find_recipe(config["recipe"], "the record").current(config)}


def _without_later(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record without what summaries and routing have said only since the first records were made."""
    if isinstance(routing := found.get("routing"), Mapping):
        layers = [{k: v for k, v in layer.items() if k != "typical"} for layer in routing["layers"]]
        found = {**found, "routing": {**routing, "layers": layers}}
    summary = found.get("summary")
    if not isinstance(summary, Mapping):
        return found
    summary = {name: value for name, value in summary.items() if name not in LATER}
    tested = {task: {k: v for k, v in said.items() if k not in LATER} for task, said in summary.get("test", {}).items()}
    return {**found, "summary": summary | ({"test": tested} if "test" in summary else {})}


def shown(lines: list[str]) -> str:
    """The first of them, and how many there are."""
    more = [f"... and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
    return "\n".join([f"{len(lines)} values are not as recorded:", *lines[:MAX_SHOWN], *more])


def _same(name: str, old: Any, new: Any, exact: bool, tolerance: float) -> bool:
    if isinstance(old, float | int) and isinstance(new, float | int):
        if old == new or (math.isnan(old) and math.isnan(new)):
            return True
        return not exact and (not _computed_loss(name) or math.isclose(old, new, rel_tol=tolerance))
    return bool(old == new) or (not exact and not name.startswith("config"))


def _computed_loss(name: str) -> bool:
    return name.startswith("config") or LOSS.search(name) is not None


def values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of a record under a name that says where it is from."""
    found: dict[str, Any] = {}
    for part, content in record.items():
        if part == "metrics":
            for row in csv.DictReader(content):
                step = row.pop("step")
                found |= {f"metrics, step {step}, {name}": float(value) for name, value in row.items() if value}
        elif part not in ("machine", "commit"):
            _flatten(part, content, found)
    return found


def _flatten(name: str, data: Any, found: dict[str, Any]) -> None:
    if isinstance(data, Mapping | list) and data:
        for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            if not CLOCK.search(str(key)) or name.startswith("config"):
                _flatten(f"{name}.{key}", value, found)
    else:
        found[name] = data
