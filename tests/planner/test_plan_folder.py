"""Planning models of transformers: their parameters exactly, and bytes beside those of a real step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.0", reason="adoption is of transformers 5")
sys.path.append(str(Path(__file__).parents[1] / "huggingface"))
from adoptable import CONFIGS, model, tokens
from hf_models import nllb, switch

from moekit.cli.program import main
from moekit.errors import UserError
from moekit.huggingface import adopt, layout_of
from moekit.parallel.layout import Layout, Training
from moekit.planner.forecast import forecast_of
from moekit.planner.transformers_models import census_of
from moekit.runs.folders.plan import folder_plan
from moekit.surgery import add_adapters

SMALL = Training(sequences=2, source_length=9, target_length=9, precision="32-true")


@pytest.mark.parametrize("block", [*CONFIGS, "switch", "nllb"])
def test_every_parameter_is_counted_once(block: str) -> None:
    theirs = {"switch": switch, "nllb": nllb}[block]() if block in ("switch", "nllb") else model(block)
    found = adopt(theirs.to("meta"), aux=None)
    census, layout = census_of(found, SMALL), layout_of(found)
    assert census.parameters == layout.parameters == sum(p.numel() for p in found.parameters())
    assert census.expert_parameters == layout.of_experts
    assert census.active_parameters == layout.active
    assert census.forward_flops > 0
    kinds = [unit.name for unit in census.units if unit.kind == "block"]
    assert any("sparse" in kind for kind in kinds)
    if block == "MixtralSparseMoeBlock":  # by hand: T tokens, V words, D, H, F, E, k
        t, v, d, f, e, k = 18, 60, 32, 24, 4, 2
        attention = 2 * t * d * (d + 2 * 16 + d) + 4 * t * 9 * d
        assert census.forward_flops == 2 * (attention + 2 * t * d * e + 2 * t * k * 3 * d * f) + 2 * t * d * v
        assert sum(u.count * u.cost.sent for u in census.units) == 2 * k * t * d


def test_bytes_are_those_of_a_real_step() -> None:
    found = adopt(model("Qwen3MoeSparseMoeBlock"), aux=None).train()
    training = Training(sequences=2, source_length=48, target_length=48, precision="32-true")
    optimizer = torch.optim.AdamW(found.parameters(), lr=1e-3)
    held: dict[int, Tensor] = {}
    own = {t.untyped_storage().data_ptr() for t in (*found.parameters(), *found.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = found(tokens(1, 2, 48), use_cache=False).logits
    kept = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)
    logits.sum().backward()
    optimizer.step()
    state = sum(t.nbytes for one in optimizer.state.values() for t in one.values() if t.ndim)
    made = forecast_of(census_of(found.to("meta"), training), Layout(devices=1, zero_stage=0), training)
    assert made.memory.weights == made.memory.gradients == 4 * made.parameters
    assert made.memory.optimizer == state
    loss = 8 * 2 * 48 * 60  # log-probabilities and their gradient
    assert made.memory.activations - loss == pytest.approx(kept, rel=0.1)


def test_frozen_weights_need_no_gradient() -> None:
    found = adopt(model("MixtralSparseMoeBlock").to("meta"), aux=None)
    layout = Layout(devices=2, expert_parallel_size=2, zero_stage=1)
    whole = forecast_of(census_of(found, SMALL), layout, SMALL)
    found.requires_grad_(False)
    names = add_adapters(found, rank=2, targets=("experts",))
    for name in names:
        found.get_parameter(name).requires_grad_(True)
    made = forecast_of(census_of(found, SMALL), layout, SMALL)
    trained = sum(found.get_parameter(name).numel() for name in names)
    assert made.census.trained_parameters == trained
    assert made.memory.gradients == 4 * trained / 2
    assert made.memory.optimizer == 8 * trained / 2
    assert made.traffic.all_reduce == 0, "experts are on one device each, all else is frozen"
    assert whole.traffic.all_reduce > 0
    assert made.flops_per_token < whole.flops_per_token
    assert "trained" in made.table()
    assert "trained" not in whole.table()


def test_the_command_reads_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "model"
    model("OlmoeSparseMoeBlock").save_pretrained(place)
    file = place / "model.safetensors"
    with file.open("r+b") as opened:  # a header, and nothing behind it that could be read as the weights
        length = int.from_bytes(opened.read(8), "little")
        opened.seek(8 + length)
        opened.write(b"\xff" * (file.stat().st_size - 8 - length))
    assert main(["plan", "--model", str(place), "--devices", "4", "--length", "32", "--memory", "1"]) == 0
    shown = capsys.readouterr().out
    assert "full fine-tuning:" in shown
    assert "adapters of rank 16 on experts:" in shown
    assert "4 devices, expert 2" in shown
    assert "fits into 1 GiB a device" in shown
    assert main(["plan", "--model", str(place), "--length", "32", "--memory", "0.00001"]) == 0
    assert "no layout fits into 1e-05 GiB a device" in capsys.readouterr().out


def test_plans_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model("OlmoeSparseMoeBlock").save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--length", "100"]) == 2
    assert "has 64 positions: got sequences of 100 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="planned in 32-true or bf16-true: got bf16-mixed"):
        folder_plan(tmp_path, 1, Training(sequences=1, source_length=8, target_length=8))
    with pytest.raises(UserError, match="--targets: targets must be some of"):
        folder_plan(tmp_path, 1, SMALL, rank=2, targets=["nothing"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": 5}))
    with pytest.raises(UserError, match="must have shape"):
        folder_plan(tmp_path, 1, SMALL)
