"""Processes with other settings, code or data are refused on all ranks before the first step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel

from moekit.errors import UserError
from moekit.testing import run_distributed
from moekit.testing.distributed import JoinedProcesses
from moekit.training.callbacks.same_ranks import SameOnRanks


def _refused() -> list[str]:
    class Never(BoringModel):
        def training_step(self, batch: Any, index: int) -> Any:
            raise AssertionError("a step was made")

    def trainer(facts: dict[str, Any], **options: Any) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", plugins=[JoinedProcesses()], callbacks=[SameOnRanks(facts)],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip

    rank = dist.get_rank()
    try:
        trainer({"train.learning_rate": [1e-3, 2e-3][rank], "same": 1, **({"more": 5} if rank else {})}).fit(Never())
    except UserError as error:
        trainer({"same": [1, None]}, max_steps=1, limit_val_batches=0).fit(BoringModel())
        return [str(error)]
    return []


def test_what_differs_is_named_with_its_rank_on_all_ranks() -> None:
    one, other = run_distributed(_refused, 2, timeout=300)
    assert one == other
    assert "\n  train.learning_rate: 0.001 on rank 0, 0.002 on rank 1\n  more: None on rank 0, 5 on rank 1\n" in one[0]
    assert "same:" not in one[0]


@pytest.mark.slow
@pytest.mark.parametrize("different", ["a setting", "the text", "the source"])
def test_a_recipe_compares_settings_text_and_source(different: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        text = tmp_path / f"text{rank}"
        text.mkdir()
        for split in ("train", "valid", "test"):
            for language in ("en", "de"):
                more = " two" if rank and different == "the text" else ""
                lines = [f"{language} line {n}{more}\n" for n in range(60)]
                (text / f"{split}.{language}").write_text("".join(lines))
        program = "import sys; from moekit.cli.recipes import main; from moekit.recipes import switch\n"
        if rank and different == "the source":
            program += "import moekit.recipes.switch as s, inspect; inspect.getfile = lambda made: sys.argv[-1]\n"
            (tmp_path / "other.py").write_text("# another recipe\n")
        program += "sys.exit(main(switch.RECIPE, sys.argv[1:-1]))"
        arguments = [
            "fit", "--devices=2", "--model.dim=16", "--model.heads=2", "--model.hidden_dim=32", "--train.max_steps=2",
            "--train.warmup_steps=1", "--train.accelerator=cpu", "--data.source=moses", f"--data.path={text}",
            f"--train.clip={2 if rank and different == 'a setting' else 1}", f"--out={tmp_path / 'run'}",
            f"--data.cache={tmp_path / f'cache{rank}'}", "--data.vocab_size=60", str(tmp_path / "other.py"),
        ]  # fmt: skip
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
        command = [sys.executable, "-c", program, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], told
    words = {
        "a setting": "train.clip: 1.0 on rank 0, 2.0 on rank 1",
        "the text": "\n  text: '",
        "the source": "source of",
    }
    assert all(words[different] in errors for errors in told), told
    assert not (tmp_path / "run").exists()
