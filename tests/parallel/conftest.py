"""A checkpoint folder of the small network."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_net import trained

from moekit.parallel import Checkpointer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net, made = trained()
    Checkpointer().save(tmp_path / "last", net, [made], extra={"step": 2})
    return tmp_path / "last"
