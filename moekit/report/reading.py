"""Reading a run folder: whatever of it exists, without trusting any of it.

A folder after `fit` has no summary, an interrupted run has half the metrics, and a loss may be NaN. The report is most
needed exactly then, so a missing or broken file never stops it: it is noted in `RunFolder.notes` and its section says
so.
"""

from __future__ import annotations

import contextlib
import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

from moekit.errors import UserError
from moekit.folder_kinds import kind_of
from moekit.report.run_folder import RunFolder, Series
from moekit.report.tuned_folder import as_run
from moekit.runs.record import STOPPED, Sample
from moekit.stored import parse_json
from moekit.training.monitoring.rules import WARNINGS, Warned

FILES = ("config.yaml", "environment.json", "metrics.csv", "summary.json", "routing.json", "samples.json")


def read_run(run_dir: Path) -> RunFolder:
    """Read the folder of a run, or of a fine-tuning of a folder of transformers.

    Raises:
        UserError: if `run_dir` is no folder, or holds none of a run's files.
    """
    if not run_dir.is_dir():
        raise UserError(f"A run folder is required: {run_dir} is not a folder. Give the --out folder of a run.")
    if not any((run_dir / name).is_file() for name in FILES):
        raise UserError(
            f"A run folder holds at least one of {', '.join(FILES)}: {run_dir} has none of them. "
            "Give the --out folder of a run (not its checkpoints)."
        )
    notes: dict[str, str] = {}
    config, samples, tuned = "", [], kind_of(run_dir) == "tuned"
    try:
        config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes["config.yaml"] = _unreadable(run_dir / "config.yaml", error)
    for entry in [] if tuned else _json(run_dir / "samples.json", list, notes):
        with contextlib.suppress(ValueError):
            samples.append(Sample.from_json(entry, []))
    stopped = _json(run_dir / STOPPED, dict, {}).get("why")
    warned = []
    said = _json(run_dir / WARNINGS, dict, {}).get("warnings")
    for entry in said if isinstance(said, list) else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            warned.append(Warned.of(entry))
    names = ("environment", "results") if tuned else ("environment", "summary", "routing")
    objects = {name: _json(run_dir / f"{name}.json", dict, notes) for name in names}
    results = objects.pop("results", {})
    run = RunFolder(
        run_dir,
        config,
        metrics=_metrics(run_dir / "metrics.csv", notes),
        samples=tuple(samples),
        stopped=f"Training stopped: {stopped}" if isinstance(stopped, str) else "",
        warned=tuple(warned),
        notes=notes,
        **objects,
    )
    return as_run(run, results) if tuned else run


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"This run folder has no {path.name}."
    return f"{path.name} could not be read: {error}."


def _json(path: Path, kind: type, notes: dict[str, str]) -> Any:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes[path.name] = _unreadable(path, error)
        return kind()
    if not isinstance(value, kind):
        required = "an object" if kind is dict else "a list"
        notes[path.name] = f"{path.name} must hold {required}: got {type(value).__name__}."
        return kind()
    return value


def _metrics(path: Path, notes: dict[str, str]) -> dict[str, Series]:
    """Columns of metrics.csv; a resumed run repeats steps (and perhaps the header), and the last value wins."""
    points: dict[str, dict[float, float]] = {}
    bad: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = csv.reader(line.replace("\0", "") for line in file)
            header = [name.strip() for name in next(rows, [])]
            if "step" not in header:
                notes[path.name] = f"{path.name} must begin with a header that has the column step."
                return {}
            for row in rows:
                if [cell.strip() for cell in row] == header or not any(cell.strip() for cell in row):
                    continue
                try:
                    cells = {n: float(c) for n, c in zip(header, row, strict=False) if c.strip()}
                    step = cells["step"]
                except (ValueError, KeyError):
                    bad.append(rows.line_num)
                    continue
                for name, value in cells.items():
                    points.setdefault(name, {})[step] = value
    except (OSError, csv.Error) as error:
        notes[path.name] = _unreadable(path, error)
    if bad:
        some = ", ".join(map(str, bad[:5])) + (" and more" if len(bad) > 5 else "")
        notes[path.name] = f"{len(bad)} lines of {path.name} are no numbers and were left out (line {some})."
    columns = {}
    for name, values in points.items():
        if name not in ("step", "epoch", ""):
            steps = sorted(s for s in values if math.isfinite(s))
            columns[name] = Series(np.array(steps), np.array([values[s] for s in steps]))
    return columns
