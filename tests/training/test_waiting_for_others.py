"""A process that waits for others to join says so, and for whom; one that has company says nothing."""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from moekit.training import processes


def trainer(**more: Any) -> Any:
    met = SimpleNamespace(main_address="10.1.2.3", main_port=29500)
    strategy = SimpleNamespace(cluster_environment=met, launcher=None, _timeout=timedelta(minutes=30))
    known = {"num_devices": 2, "num_nodes": 4, "local_rank": 0, "global_rank": 6, "world_size": 8}
    return SimpleNamespace(strategy=strategy, **{**known, **more})


def test_it_says_for_whom_and_where_ever_less_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_SECONDS_TO_JOIN", 0.1)
    with processes.explained(trainer()):
        time.sleep(1.0)  # words at 0.1, 0.3 and 0.7 seconds
    said = capsys.readouterr().err.splitlines()
    assert 2 <= len(said) <= 3
    assert said[0].startswith("note: rank 6 of 8 has waited 0 seconds for the others to join at 10.1.2.3, port 29500 ")
    assert "gives up after 30 minutes" in said[0]
    time.sleep(1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("alone", [{"num_devices": 1, "num_nodes": 1, "world_size": 1}, {"local_rank": 1}, {}])
def test_who_need_not_wait_or_has_joined_says_nothing(
    alone: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_SECONDS_TO_JOIN", 0.05)
    if not alone:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with processes.explained(trainer(**alone)):
        time.sleep(0.3)
    assert capsys.readouterr().err == ""
