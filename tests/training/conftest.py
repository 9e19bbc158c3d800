"""Processes of their own for tests, without the seconds that importing everything takes each time."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

import pytest


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Processes are forked from one that has imported everything once, and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lightning", "torch._dynamo", "moekit.training.callbacks.interrupt", "moekit.training.metrics"]
    )
    return context
