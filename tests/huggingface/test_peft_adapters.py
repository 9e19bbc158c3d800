"""Adapters of adopted models: the same function when merged, and in the format of PEFT, both ways."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adoptable import left_padded, model, tokens
from hf_models import as_their_router_means, nllb, switch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moekit.errors import UserError
from moekit.huggingface import adopt, read_adapters, write_adapters
from moekit.surgery import add_adapters, merge_adapters
from moekit.surgery.adapters import is_adapter

CASES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: model("MixtralSparseMoeBlock"),
    "qwen2": lambda: model("Qwen2MoeSparseMoeBlock"),
    "deepseek": lambda: model("DeepseekV3MoE"),
    "gpt-oss": lambda: model("GptOssMLP"),
    "granite": lambda: model("GraniteMoeMoE"),
    "switch": lambda: switch(expert_capacity=100),
    "nllb": lambda: nllb(),
}
ALL = ("experts", "routers", "attention", "feed_forward")


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    as_their_router_means(monkeypatch)


def adapted(found: Any, targets: tuple[Any, ...] = ALL) -> Any:
    """Adopted, with adapters as if they had been trained."""
    ours = adopt(found, aux=None)
    add_adapters(ours, rank=2, alpha=6.0, targets=targets)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return ours.eval()


@torch.no_grad()
def logits(found: Any) -> Tensor:
    ids = tokens(5).clamp(max=39)
    given = {"decoder_input_ids": ids} if found.config.is_encoder_decoder else {}
    out: Tensor = found(input_ids=ids, **given).logits
    return out


@pytest.mark.parametrize("name", CASES)
def test_adapters_are_written_read_and_merged(name: str, tmp_path: Path) -> None:
    base = CASES[name]()
    plain = logits(adopt(copy.deepcopy(base), aux=None))
    ours, again = adapted(copy.deepcopy(base)), adopt(copy.deepcopy(base), aux=None)
    changed = logits(ours)
    assert not torch.allclose(changed, plain, atol=1e-3)
    write_adapters(ours, tmp_path)
    names = read_adapters(again, tmp_path)
    own = {n: p for n, p in ours.named_parameters() if is_adapter(n)}
    assert set(names) == set(own)
    for key, parameter in again.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(key)), key
    assert torch.equal(logits(again), changed)

    expected = {n: t.clone() for n, t in ours.state_dict().items() if not is_adapter(n)}
    for stem in {n.removesuffix(".down") for n in own if n.endswith(".down")}:
        pair = ours.get_submodule(stem)
        head, _, last = stem.rpartition(".")
        matrix = f"{head}.weight" if last == "adapter" else f"{head.rpartition('.')[0]}.{last}"
        product = 3.0 * (pair.down @ pair.up)
        rows = last == "adapter" or "transposed" in stem
        expected[matrix] = expected[matrix] + (product.transpose(-1, -2) if rows else product)
    for found in (ours, again):
        merge_adapters(found)
        state = found.state_dict()
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), key
    torch.testing.assert_close(logits(ours), changed, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(adopt(type(base).from_pretrained(tmp_path / "merged"), aux=None)), logits(ours))


@pytest.mark.parametrize("targets", [ALL, ("experts",), ("routers",), ("attention",)])
@pytest.mark.parametrize("name", CASES)
def test_peft_opens_them_and_its_own_are_read(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    if targets != ALL and name in ("granite", "nllb", "deepseek"):
        pytest.skip("one selection is enough here")
    base = CASES[name]()
    ours = adapted(copy.deepcopy(base), targets)
    write_adapters(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.mul_(-0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = adopt(copy.deepcopy(base), aux=None)
    read_adapters(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-4, atol=1e-5)
    merge_adapters(again)
    torch.testing.assert_close(logits(again), logits(theirs.merge_and_unload()), rtol=1e-4, atol=1e-5)


def test_targets_and_scales_of_peft_are_understood(tmp_path: Path) -> None:
    """Short names of parameters, and rsLoRA's scale."""
    ours = adapted(model("OlmoeSparseMoeBlock"), ("experts",))
    write_adapters(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    config |= {"target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"], "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = adopt(model("OlmoeSparseMoeBlock"), aux=None)
    read_adapters(again, tmp_path)
    scales = [float(b) for n, b in again.named_buffers() if n.endswith("scale")]
    assert scales == [pytest.approx(6 / 2**0.5)] * 4


@pytest.mark.parametrize("kind", [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_initialisations_of_peft(kind: bool | str, tmp_path: Path) -> None:
    """One that leaves the model as it is, is the same function here; another is refused, and taken once converted."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=kind, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model("OlmoeSparseMoeBlock"), config).eval()
    theirs.save_pretrained(tmp_path / "begin")
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "end")
    again, found = adopt(model("OlmoeSparseMoeBlock"), aux=None), tmp_path / "end"
    if str(kind).startswith(("pissa", "olora")):
        with pytest.raises(UserError, match="init_lora_weights must leave the weights of the model as they are"):
            read_adapters(again, found)
        edit(tmp_path / "begin", init_lora_weights=True)  # as PEFT's guide has it: what is loaded changes nothing
        theirs.peft_config["default"].init_lora_weights = True
        found = tmp_path / "converted"
        theirs.save_pretrained(found, path_initial_model_for_weight_conversion=str(tmp_path / "begin"))
    read_adapters(again, found)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_only_adapters_train_and_every_expert_has_its_own() -> None:
    ours, (ids, mask) = adapted(model("Qwen3MoeSparseMoeBlock")), left_padded()
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    ours.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name
    up = ours.model.layers[0].mlp.experts.transposed_adapters["down_proj"].up
    assert up.shape == (5, 2, 32)
    assert up.grad is not None


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def first(tensors: dict[str, Tensor]) -> str:
    return next(iter(sorted(tensors)))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
    "another kind": (lambda f: edit(f, peft_type="IA3"), "LORA"),
    "DoRA": (lambda f: edit(f, use_dora=True), "use_dora"),
    "biases": (lambda f: edit(f, bias="all"), "bias"),
    "ranks by name": (lambda f: edit(f, rank_pattern={"q_proj": 4}), "rank_pattern"),
    "a kind of activation": (
        lambda f: edit(f, alora_invocation_tokens=[3]),
        "alora_invocation_tokens must not be given",
    ),
    "another rank": (lambda f: edit(f, r=4), "must have shapes"),
    "half a pair": (lambda f: edit_weights(f, lambda t: t.pop(first(t))), "half a pair"),
    "unknown": (lambda f: edit_weights(f, lambda t: t.update({"x.lora_A.weight": torch.ones(2)})), "none of them"),
    "altered": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-4] + b"abcd"
        ),
        "altered",
    ),
    "no parameters named": (lambda f: edit(f, target_parameters=None), "none of them"),
}


BROKEN |= {
    kind: (partial(edit, init_lora_weights=kind), f"got '{kind}'.*path_initial_model_for_weight_conversion")
    for kind in ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga")
}


@pytest.mark.parametrize("name", BROKEN)
def test_folders_that_are_refused(name: str, tmp_path: Path) -> None:
    change, words = BROKEN[name]
    write_adapters(adapted(model()), tmp_path)
    change(tmp_path)
    again = adopt(model(), aux=None)
    with pytest.raises(UserError, match=words):
        read_adapters(again, tmp_path)
    assert not any(is_adapter(key) for key, _ in again.named_parameters())


def test_models_that_are_refused(tmp_path: Path) -> None:
    ours = adapted(model())
    with pytest.raises(UserError, match="must have adapters"):
        write_adapters(adopt(model(), aux=None), tmp_path)
    write_adapters(ours, tmp_path)
    with pytest.raises(UserError, match="already"):
        read_adapters(ours, tmp_path)
