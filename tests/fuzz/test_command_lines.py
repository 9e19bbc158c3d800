"""Changed command lines of every command are done or refused in one line: no other error, nothing written elsewhere."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from command_lines import LINES, fuzz_lines
from harness import Outcome

from moekit.cli.program import REPORTS, STUDIES, SURGERY
from moekit.cli.recipes import COMMANDS

SEEDS = {
    **dict.fromkeys(SURGERY, 200), **dict.fromkeys(REPORTS, 200), **dict.fromkeys(STUDIES, 100),
    **dict.fromkeys(COMMANDS, 100),
}  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


def in_a_process_of_its_own(command: str, room: Path, seeds: range) -> Outcome:
    """With bounds of memory, so that a crash of the interpreter, or memory without end, is a fault like any other."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(fuzz_lines, command, room, seeds).result()
        except BrokenProcessPool:
            pytest.fail(f"{command}, seed {(room / 'seed').read_text()}: the process crashed")


@pytest.mark.slow
@pytest.mark.parametrize("command", SEEDS)
def test_changed_command_lines_are_done_or_refused(command: str, room: Path) -> None:
    seeds = range(SEEDS[command])
    outcome = in_a_process_of_its_own(command, room, seeds)
    print(f"\n{command}: {len(seeds)} command lines, {dict(outcome.counts)}")
    assert not outcome.faults, f"{len(outcome.faults)} of {len(seeds)}:\n" + "\n".join(outcome.faults[:20])
    assert sum(outcome.counts.values()) == len(seeds)
    assert outcome.counts["refused"] >= 0.3 * len(seeds), "mistakes must be found, or they were none"


def test_every_command_has_lines() -> None:
    assert {*SEEDS} == {*LINES}
