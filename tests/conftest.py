"""What every test stands on: one thread, fixed seeds, no network, caches that are nobody's."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-runs",
        action="store_true",
        help="write down what runs of recipes compute (tests/recipes/recorded) instead of comparing with it",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Compilers may keep what they built from one run of the suite to the next, inside the repository's own
    # test cache; anything else that writes to the user's cache folder gets a fresh one (see `isolation`).
    cache = getattr(config, "cache", None)
    if cache is not None:
        for variable, folder in (
            ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
            ("TRITON_CACHE_DIR", "triton"),
            ("MPLCONFIGDIR", "matplotlib"),
        ):
            os.environ.setdefault(variable, str(cache.mkdir(folder)))
    # Also for the processes that tests start.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)


RANKS = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "PL_GLOBAL_SEED",  # which Lightning seeds processes with that are started later
    "PL_SEED_WORKERS",
)
"""What Lightning tells the processes that it starts. A fit in a test's own process leaves it behind, and a program that
a later test starts would meet at a port that is taken."""


@pytest.fixture(autouse=True)
def ranks_are_forgotten() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in RANKS}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder for each test; the same one, until a test has left something in it."""
    folder = tmp_path_factory.mktemp("homes")

    def empty() -> Iterator[Path]:
        for number in itertools.count():
            (folder / str(number)).mkdir()
            while not any((folder / str(number)).iterdir()):
                yield folder / str(number)

    return empty()


@pytest.fixture(autouse=True)
def isolation(monkeypatch: pytest.MonkeyPatch, homes: Iterator[Path]) -> None:
    """Same seeds before every test, a cache folder of its own, and no connection beyond this machine."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.setenv("HOME", str(next(homes)))

    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        here = address[0] in ("127.0.0.1", "::1", "localhost")
        if self.family in (socket.AF_INET, socket.AF_INET6) and not here:
            raise RuntimeError(f"Tests must not use the network: a connection to {address} was asked for.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT
