"""Damaged files of every kind are refused in one line or read as they were written: no other error, and no crash."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from kinds import KINDS, Outcome, fuzz

SEEDS = {
    "checkpoint of one file": 1000,
    "sharded checkpoint": 700,
    "weights of one file": 500,
    "weights of an exchange folder": 300,
    "settings of an exchange folder": 500,
    "settings of an adopted model": 300,
    "token store": 900,
    "token store, unchecked": 500,
    "tokenizer": 600,
    "held-out text": 500,
    "configuration of a run": 600,
    "metrics of a run": 300,
    "records of a run": 1400,
    "moses": 1400,
    "text": 800,
    "tsv": 1500,
    "jsonl": 1500,
    "examples": 1100,
    "catalogs": 800,
    "catalog": 800,
    "lines of an input": 600,
    "moses, .gz": 500,
    "moses, .xz": 500,
    "moses, .bz2": 500,
}
FEW = 40


def in_a_process_of_its_own(name: str, room: Path, seeds: range) -> Outcome:
    """So that a crash of the interpreter is a fault like any other."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(fuzz, name, room, seeds).result()
        except BrokenProcessPool:
            pytest.fail(f"{name}, seed {(room / 'seed').read_text()}: the process crashed")


def check(name: str, outcome: Outcome, seeds: range) -> None:
    print(f"\n{name}: {len(seeds)} damaged, {dict(outcome.counts)}")
    assert not outcome.faults, f"{len(outcome.faults)} of {len(seeds)}:\n" + "\n".join(outcome.faults[:20])
    assert sum(outcome.counts.values()) == len(seeds)
    assert outcome.counts["refused"] >= KINDS[name].least * len(seeds), "damage must be found, or it was none"


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_or_harmless(name: str, tmp_path: Path) -> None:
    seeds = range(FEW, FEW + SEEDS[name])
    check(name, in_a_process_of_its_own(name, tmp_path, seeds), seeds)


@pytest.mark.parametrize("name", KINDS)
def test_a_few_damaged_files(name: str, tmp_path: Path) -> None:
    check(name, fuzz(name, tmp_path, range(FEW)), range(FEW))
