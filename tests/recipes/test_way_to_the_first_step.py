"""How much one reads to follow ``run`` to the first optimizer step, as docs/architecture.md says."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import moekit.runs.fit  # noqa: F401 - before it is needed: the bodies of classes are no functions on the way
from moekit.cli.recipes import main
from moekit.recipes import switch

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "runs")
"""Where the way lies; what it leads to is models, data and training, which have pages of their own."""
AT_MOST = 920
ABOUT = 12
"""By how many lines a row of the table may be wrong: it is rounded."""
ROW = re.compile(r"^\| `((?:cli|runs)/\S+\.py)` \| (\d+) \|", re.M)


class FirstStepError(Exception):
    """The first optimizer step begins."""


def lines_that_run(arguments: list[str]) -> dict[str, int]:
    """Lines of the functions of `ROOMS` that run until the first step, their docstrings included, by file."""
    seen: set[CodeType] = set()

    def enter(frame: FrameType, event: str, value: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    def stop(optimizer: torch.optim.Optimizer, given: Any, options: Any) -> None:
        sys.setprofile(None)
        raise FirstStepError

    hook = register_optimizer_step_pre_hook(stop)
    sys.setprofile(enter)
    try:
        main(switch.RECIPE, arguments)
    except FirstStepError:
        pass
    else:
        raise AssertionError("no optimizer step was taken")
    finally:
        sys.setprofile(None)
        hook.remove()
    lines: dict[str, set[int]] = {}
    for code in seen:
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT / "moekit") and path.relative_to(ROOT / "moekit").parts[0] in ROOMS:
            if code.co_name == "<module>":
                continue
            source, first = inspect.getsourcelines(code)
            place = str(path.relative_to(ROOT / "moekit"))
            lines.setdefault(place, set()).update(range(first, first + len(source)))
    return {place: len(found) for place, found in sorted(lines.items())}


def test_the_way_is_short_and_the_table_is_true(tmp_path: Path) -> None:
    small = {
        "model.dim": 16, "model.heads": 2, "model.hidden_dim": 32, "model.num_experts": 2, "data.babel_sentences": 60,
        "data.vocab_size": 400, "data.cache": tmp_path / "cache", "train.accelerator": "cpu",
    }  # fmt: skip
    options = [f"--{key}={value}" for key, value in small.items()]
    found = lines_that_run(["run", *options, "--out", str(tmp_path / "run")])
    table = {place: int(lines) for place, lines in ROW.findall((ROOT / "docs/architecture.md").read_text("utf-8"))}
    assert table.keys() == found.keys(), "docs/architecture.md names the files on the way"
    wrong = {place: lines for place, lines in found.items() if abs(table[place] - lines) > ABOUT}
    assert not wrong, "docs/architecture.md says how many lines these files have on the way, rounded to tens"
    assert sum(found.values()) <= AT_MOST
