"""Folders of transformers, adopted without transformers' own loading: every architecture, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adoptable import CONFIGS, assert_same_gradients, model, tokens
from hf_models import nllb, switch

from moekit.errors import UserError
from moekit.huggingface import adopt, adopt_folder
from moekit.huggingface.folder import on_meta

ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "switch": lambda: switch(dropout_rate=0.0, router_jitter_noise=0.0, router_bias=True),
    "nllb": lambda: nllb(dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False),
}


SHARDED = ["MixtralSparseMoeBlock", "GptOssMLP", "switch"]
CASES = [(block, "1GB") for block in (*CONFIGS, *ENCODER_DECODERS)] + [(block, "20KB") for block in SHARDED]


@pytest.mark.parametrize(("block", "shards"), CASES)
def test_a_folder_is_the_model_that_was_saved(block: str, shards: str, tmp_path: Path) -> None:
    theirs = ENCODER_DECODERS[block]() if block in ENCODER_DECODERS else model(block, 1)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    ours, adopted = adopt_folder(tmp_path / "theirs", aux=None), adopt(theirs, aux=None)
    assert not ours.training
    expected, got = adopted.state_dict(), ours.state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    for (name, one), (_, other) in zip(ours.named_buffers(), adopted.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    ids = tokens(5).clamp(max=39)
    given = {"decoder_input_ids": ids} if block in ENCODER_DECODERS else {}
    for found in (adopted, ours):
        found(ids, **given).logits.square().mean().backward()
    assert_same_gradients(adopted, ours)
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shards)
    if (block, shards) == ("switch", "20KB"):  # theirs are dealt to files in another order
        assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
        again = adopt_folder(tmp_path / "ours", aux=None).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
        return
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name


def test_types_can_be_chosen(tmp_path: Path) -> None:
    theirs = model("Qwen3MoeSparseMoeBlock").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    assert {p.dtype for p in adopt_folder(tmp_path, aux=None).parameters()} == {torch.bfloat16}
    wide = adopt_folder(tmp_path, aux=None, dtype=torch.float32)
    assert torch.equal(wide.lm_head.weight, theirs.lm_head.weight.float())
    assert wide.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_type_is_that_of_most_stored_weights_where_the_configuration_has_none(device: str, tmp_path: Path) -> None:
    theirs = model("Qwen3MoeSparseMoeBlock").to(torch.bfloat16)
    for layer in theirs.model.layers:
        layer.mlp.gate.float()  # routers alone are wider
    theirs.save_pretrained(tmp_path)
    edited(tmp_path, dtype=None)
    found = adopt_folder(tmp_path, device=device, aux=None)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    (tmp_path / "model.safetensors").unlink()
    assert on_meta(tmp_path, None).dtype == torch.float32
    assert on_meta(tmp_path, torch.float16).dtype == torch.float16


def test_nothing_is_read_on_the_meta_device(tmp_path: Path) -> None:
    model("MixtralSparseMoeBlock").save_pretrained(tmp_path)
    found = adopt_folder(tmp_path, device="meta", aux=None)
    assert all(p.is_meta for p in found.parameters())
    assert not any(b.is_meta for b in found.buffers()), "tables that are in no file are there"


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a pickle": (without_index, "Pickles are not read"),
    "another size": (lambda folder: edited(folder, moe_intermediate_size=24), "must have shape"),
    "more experts": (lambda folder: edited(folder, num_experts=9, num_local_experts=9), "must have shape"),
    "more layers": (lambda folder: edited(folder, num_hidden_layers=3), "has no tensor"),
    "fewer layers": (lambda folder: edited(folder, num_hidden_layers=1), "has no place for it"),
    "another class": (lambda folder: edited(folder, architectures=["Linear"]), "architecture"),
    "quantized": (lambda folder: edited(folder, quantization_config={"quant_method": "fp8"}), "quantized"),
    "unknown": (lambda folder: edited(folder, model_type="nobody"), "no configuration that transformers knows"),
    "cut": (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "whole safetensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_are_refused(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    model("Qwen3MoeSparseMoeBlock").save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=words):
        adopt_folder(tmp_path)
