"""Nobody asks which task it is: a task's name stands in its own file, and in recipes that choose it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from moekit.tasks import TASKS

PACKAGE = Path(__file__).resolve().parents[2] / "moekit"

# Where a task's name may stand beside its own file and recipes -> why.
ELSEWHERE = {
    "data/sources/jsonl.py": "a key of Hugging Face's format for parallel text, which is called as the task is",
    "report": "folders of former versions say no more of their tasks than names",
}


def named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that hold the name of a task as a string, alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in TASKS:
            yield node.lineno, node.value


def allowed(path: Path, task: str) -> bool:
    place = path.relative_to(PACKAGE)
    recipe = place.parts[0] == "recipes" and not place.name.startswith("_")
    return recipe or place == Path("tasks", f"{task}.py") or any(place.is_relative_to(p) for p in ELSEWHERE)


def test_every_task_has_a_file_of_its_name() -> None:
    for name, task in TASKS.items():
        assert task.__module__ == f"moekit.tasks.{name}"
        assert task.head.__module__ == task.__module__
        assert task.head.task == task.name == name


def test_names_of_tasks_stand_in_their_files_alone() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {task}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, task in named(ast.parse(path.read_text(encoding="utf-8")))
        if not allowed(path, task)
    ]
    assert not found, "ask the task (moekit.tasks.TASKS) instead of its name:\n" + "\n".join(found)


def test_a_branch_on_a_name_is_found() -> None:
    tree = ast.parse('"""Of "causal_lm" and others."""\nif batch.task == "causal_lm":\n    pass\n')
    assert list(named(tree)) == [(2, "causal_lm")]
    assert not allowed(PACKAGE / "data" / "batch.py", "causal_lm")
    assert not allowed(PACKAGE / "tasks" / "masked_lm.py", "causal_lm")
    assert not allowed(PACKAGE / "recipes" / "_config.py", "causal_lm")
    assert allowed(PACKAGE / "recipes" / "moe_lm.py", "causal_lm")


def test_exceptions_are_needed() -> None:
    for place in ELSEWHERE:
        paths = [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).rglob("*.py"))
        assert any(list(named(ast.parse(path.read_text(encoding="utf-8")))) for path in paths), place


def test_the_registry_is_short() -> None:
    """A task is registered by an import and an entry."""
    text = (PACKAGE / "tasks" / "registry.py").read_text(encoding="utf-8")
    for task in TASKS.values():
        assert len(re.findall(rf".*\b{task.__name__}\b.*", text)) == 2


def test_a_task_is_its_file_and_two_lines() -> None:
    """Counted for one that no recipe has of its own; files of other tasks may build on it."""
    lines = [
        line
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in {PACKAGE / "tasks" / f"{name}.py" for name in TASKS}
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search("text_to_text|TextToText", line)
    ]
    assert len(lines) == 2, lines
