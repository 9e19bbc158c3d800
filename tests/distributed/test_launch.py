"""The ways to start processes: the Trainer starts them, or torchrun does, here as two nodes on one machine."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_lm import SmallLM, one_process, sentences

SCRIPT = Path(__file__).with_name("launched.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def check(out: Path) -> None:
    found = torch.load(out, weights_only=True)
    assert found["world"] == 2
    expected = one_process(SmallLM(), sentences())["weights"]
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_trainer_starts_processes(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    subprocess.run([sys.executable, SCRIPT, out, "2", "1"], check=True, timeout=200, capture_output=True)
    check(out)


@pytest.mark.slow
def test_torchrun_with_two_nodes(tmp_path: Path) -> None:
    out, port = tmp_path / "out.pt", free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={rank}", str(SCRIPT), str(out), "1", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [node.communicate(timeout=200)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    check(out)
