"""Sections on where the numbers come from: configuration, environment, the command that makes them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from moekit.report import page
from moekit.report.page import text
from moekit.report.run_folder import RunFolder
from moekit.report.wording import MISSING, nearby

_COMMANDS = ("command", "argv")


def reproduce(run: RunFolder) -> str:
    """How to make the run again, and what it ran on."""
    lead = "The command, the resolved configuration and the machine behind every number on this page."
    command = reproduce_command(run)
    report = f"python -m moekit.report {shlex.quote(nearby(run.path))}"
    html = (
        f"<h3>Run it again</h3><pre class=command>{text(command)}</pre>"
        if command
        else page.note("The recipe is not recorded, so there is no command to show.")
    )
    html += f"<h3>Draw this page again</h3><pre class=command>{text(report)}</pre>"
    if run.config.strip():
        html += (
            f"<details><summary>Configuration (config.yaml, {len(run.config.splitlines())} lines)</summary>"
            f"<pre>{text(run.config)}</pre></details>"
        )
    else:
        html += page.note(run.notes.get("config.yaml", "config.yaml is empty."))
    shown = {k: v for k, v in flat(run.environment).items() if k not in _COMMANDS}
    if shown:
        html += f"<h3>Environment</h3>{page.definitions(shown)}"
    else:
        html += page.note(run.notes.get("environment.json", "environment.json is empty."))
    return page.section("reproduce", "How to reproduce", lead, html)


def reproduce_command(run: RunFolder) -> str:
    """The command that was typed, where it is recorded, else one that repeats the configuration; "" if neither."""
    command = next((run.environment[k] for k in _COMMANDS if run.environment.get(k)), None)
    if isinstance(command, list) and command:
        return shlex.join(map(str, command))
    if isinstance(command, str) and command.strip():
        return command.strip()
    if not run.recipe:
        return ""
    parts = ["python", "-m", f"moekit.recipes.{run.recipe}", "run"]
    if run.config.strip():
        parts += ["--config", nearby(run.path / "config.yaml")]
    elif run.variant:
        parts += ["--variant", run.variant]
    return shlex.join([*parts, "--out", f"{nearby(run.path)}-again"])


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Leaves of a nested mapping by dotted name."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif isinstance(value, list):
            found[name] = ", ".join(map(str, value))
        else:
            found[name] = MISSING if value is None else str(value)
    return found
