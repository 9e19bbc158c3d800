"""The example of the guide, by commands: an OLMoE trained from scratch, fine-tuned on two processes, opened again."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from script_module import module_of

transformers = pytest.importorskip("transformers", minversion="5.0", reason="folders are those of transformers 5")

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"


def held_out_loss(model: Any, tokenizer: Any, lines: list[str]) -> float:
    """Nats for a token, computed plainly."""
    total, count = 0.0, 0
    with torch.no_grad():
        for line in lines:
            ids = tokenizer(line + "</s>", return_tensors="pt").input_ids
            total += float(model.eval()(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


@pytest.mark.slow
def test_small_olmoe_learns_another_language(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the adapter is opened by PEFT")
    with module_of(GUIDES / "small_olmoe.py") as script:
        assert script.make(tmp_path, steps=60) < 4.5
    text = (tmp_path / "other.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(text[:300]) + "\n", encoding="utf-8")
    (tmp_path / "valid.jsonl").write_text("\n".join(text[300:]) + "\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "moekit", "finetune", "--model", "olmoe", "--data.path", "train.jsonl",
        "--data.valid_path", "valid.jsonl", "--data.max_length", "64", "--fine_tune.rank", "4",
        "--fine_tune.adapt", "experts", "--train.learning_rate", "0.01", "--train.max_steps", "20",
        "--train.accelerator", "cpu", "--train.loggers", "csv", "--devices", "2", "--merge", "--out", "tuned",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1, done.stdout
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())
    assert results["after"] < results["before"] - 0.3

    lines = [json.loads(line)["text"] for line in text[300:]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned" / "model")
    open_model = transformers.AutoModelForCausalLM.from_pretrained
    adapted = peft.PeftModel.from_pretrained(open_model(tmp_path / "olmoe"), tmp_path / "tuned" / "adapter")
    for found, said in (
        (open_model(tmp_path / "olmoe"), results["before"]),
        (open_model(tmp_path / "tuned" / "model"), results["after"]),
        (adapted, results["after"]),
    ):
        assert math.isclose(held_out_loss(found, tokenizer, lines), said, rel_tol=1e-4)
    assert Path(adapted.peft_config["default"].base_model_name_or_path) == tmp_path / "olmoe"
