"""What a run's tasks are called and how their samples are worded, as its summary.json says."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from typing import Any

from moekit.tasks import SampleWording


@dataclass(frozen=True)
class TaskWording:
    """How a task is presented; `perplexity` says whether it predicts tokens, so that exp(loss) has a meaning."""

    title: str
    explanation: str = "Loss of this task."
    perplexity: bool = True
    samples: SampleWording = field(default_factory=SampleWording)


_OLDER = tomllib.loads((resources.files("moekit.report") / "tasks.toml").read_text(encoding="utf-8"))


def task_wording(summary: Mapping[str, Any], task: str) -> TaskWording:
    """The wording in ``summary["tasks"][task]``, a neutral one for what is not there."""
    found = TaskWording(task.replace("_", " ").capitalize())
    for said in (_OLDER.get(task), _named(summary).get(task)):
        if isinstance(said, Mapping):
            samples = said["samples"] if isinstance(said.get("samples"), Mapping) else {}
            usable = {"title": str, "explanation": str, "perplexity": bool}
            words = {f.name: samples[f.name] for f in fields(SampleWording) if isinstance(samples.get(f.name), str)}
            given = {name: said[name] for name, kind in usable.items() if isinstance(said.get(name), kind)}
            found = replace(found, **given, samples=replace(found.samples, **words))
    return found


def task_order(summary: Mapping[str, Any], task: str) -> tuple[int, str]:
    """Sorts tasks as the record names them, a task that nobody names by its name at the end."""
    order = [*_named(summary), *_OLDER]
    return order.index(task) if task in order else len(order), task


def _named(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    tasks = summary.get("tasks")
    return tasks if isinstance(tasks, Mapping) else {}
