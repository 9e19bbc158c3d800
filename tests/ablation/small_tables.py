"""Small tables, and runs of them that are computed by a formula instead of being trained."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moekit.ablation.plan import Job
from moekit.ablation.processes import Commands
from moekit.ablation.session import run_table
from moekit.runs.config import RunConfig
from moekit.runs.plain import with_setting
from moekit.runs.recipe import Recipe
from moekit.terminal import Terminal


def plainly(recipe: Recipe, config: RunConfig, options: Sequence[str]) -> RunConfig:
    """Options applied without a parser, which takes a second to make; tests of tables have the real one."""
    for option in options:
        key, _, value = option.removeprefix("--").partition("=")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        config = with_setting(config, key, value)
    return config


FAKE = Path(__file__).with_name("fake_run.py")
NOISE = (0.004, -0.006, 0.002, -0.001, 0.005, 0.0)

TABLE: dict[str, Any] = {
    "title": "Many experts against few",
    "recipe": "moe_lm",
    "settings": {"model": {"dim": 16, "heads": 2, "hidden_dim": 32, "layers": 2}, "train.max_steps": 20,
                 "train.warmup_steps": 4},
    "seeds": [1, 2, 3, 4, 5],
    "learning_rates": {"values": [0.001, 0.004], "seeds": [101, 102], "metric": "loss.causal_lm"},
    "matched": ["work", "tokens"],
    "minutes": 0.5,
    "arms": {
        "many": {"about": "eight experts"},
        "few": {"about": "two experts", "settings": {"model.num_experts": 2}},
        "again": {"about": "as many", "seed_offset": 1000},
    },
    "claims": [
        {"id": "many-better", "kind": "better", "claim": "More experts are better.", "paper": "Ours",
         "published": "0.4",
         "hypothesis": "More experts hold more.", "metric": "test.causal_lm.loss", "arm": "many", "against": "few",
         "direction": "lower", "smallest": 0.05},
    ],
    "control": {"kind": "no difference", "hypothesis": "Seeds do not matter.", "metric": "test.causal_lm.loss",
                "arm": "again", "against": "many", "smallest": 0.1},
}  # fmt: skip


def changed(**parts: Any) -> dict[str, Any]:
    """`TABLE` with other parts; None leaves one out."""
    merged = json.loads(json.dumps(TABLE)) | parts
    return {key: value for key, value in merged.items() if value is not None}


def write_table(folder: Path, table: Mapping[str, Any] = TABLE, name: str = "table") -> Path:
    """Its file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(dict(table), sort_keys=False))
    return path


def formula(job: Job) -> dict[str, Any]:
    """What a run comes to: better with more experts and at a rate of 0.004, and some noise by seed."""
    seed, experts = job.config.train.seed, job.config.model.num_experts
    loss = 3.0 - 0.1 * experts**0.5 + abs(job.config.train.learning_rate - 0.004) * 50 + NOISE[seed % 5]
    return {"loss": loss, "cv": 0.2 + 0.01 * (seed % 7), "work": 1e9, "tokens": 1000, "steps": 0, "end": "done"}


def fake(settings: Callable[[Job], dict[str, Any]] = formula) -> Commands:
    """Commands of runs that `settings` say the end of."""
    return lambda job, folder: [[sys.executable, "-S", str(FAKE), str(folder), json.dumps(settings(job))]]


def run(path: Path, runs: Path, commands: Commands | None = None, **options: Any) -> tuple[dict[str, Any] | None, str]:
    """The result of a table, and what was said; other runs have results of their own, since those keep runs."""
    said = io.StringIO()
    results = path.parent / ("results" if runs.name == "runs" else f"results of {runs.name}")
    found = run_table(
        str(path),
        plainly,
        Terminal(file=said, width=200),
        runs=runs,
        at_once=options.pop("at_once", 4),
        out=options.pop("out", results),
        commands=fake() if commands is None else commands,
        **options,
    )
    return found, said.getvalue()


def began(runs: Path) -> int:
    """How often a run has begun or gone on."""
    return sum(len(path.read_text().splitlines()) for path in runs.glob("*/began"))
