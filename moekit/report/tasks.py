"""What the tasks are called, and how their samples are worded: the same on the page, the terminal and in markdown."""

from __future__ import annotations

from moekit.tasks import TASKS as KNOWN
from moekit.tasks import SampleWording

TASKS = {name: task.title for name, task in KNOWN.items()}
EXPLAINED = {
    **{name: task.explanation for name, task in KNOWN.items()},
    "": "The sum of all tasks and the routers' penalties.",
}


def task_title(task: str) -> str:
    """The task as a heading; a task that is not ours under its own name."""
    return TASKS.get(task, task.replace("_", " ").capitalize())


def sample_wording(task: str) -> SampleWording:
    """The wording for samples of `task`; a neutral one for a task that is not ours."""
    return KNOWN[task].samples if task in KNOWN else SampleWording()
