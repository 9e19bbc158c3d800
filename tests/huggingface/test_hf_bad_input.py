"""Folders that are no checkpoints, or none that moekit computes: one clear error, before a weight is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import nllb, save, switch
from safetensors.torch import load_file, save_file

from moekit.errors import UserError
from moekit.huggingface import import_model
from moekit.mapped import map_fake, read_safetensors


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(switch(), tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_no_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        import_model(folder / "nowhere")
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(UserError, match=r"it has no config\.json"):
        import_model(folder)
    for text, message in (("{", "must be readable JSON"), ("[1]", "must hold an object: got list")):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            import_model(folder)


def test_pickles_are_refused_unread(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="it has neither"):
        import_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle, which can run code.*Nothing in it was read"):
        import_model(folder)


def test_a_file_that_is_cut_off_or_something_else(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"\x00" * 200):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="must be a whole safetensors file"):
            import_model(folder)
    with pytest.raises(UserError, match="there is no file"):
        read_safetensors(folder / "none.safetensors")


def test_shards(tmp_path: Path) -> None:
    folder = save(switch(), tmp_path / "shards", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name, shard = next(iter(listed["weight_map"].items()))
    wrong = dict.fromkeys(listed["weight_map"], sorted(set(listed["weight_map"].values()) - {shard})[0])
    for content, message in (
        ({"weight_map": wrong}, f"must hold {name}, as"),
        ({"weight_map": {name: "../" + shard}}, "files of this folder"),
        ({}, "weight_map must map"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            import_model(folder)
    index.write_text(json.dumps(listed))
    (folder / shard).unlink()
    with pytest.raises(UserError, match=f"every shard that .* names: {shard} is missing"):
        import_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type must be one of switch_transformers, nllb-moe: got 't5'"),
        ({"architectures": ["SwitchTransformersEncoderModel"]}, "Only whole models are read"),
        ({"dense_act_fn": "gated-gelu"}, "cannot run the gated ones"),
        ({"dense_act_fn": "gelu"}, "tanh form only"),
        ({"router_bias": True}, "Routers of moekit have no bias"),
        ({"router_dtype": "bfloat16"}, "Routers of moekit compute in float32"),
        ({"d_model": "wide"}, "d_model must be a whole number of at least 1: got 'wide'"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1: got 0"),
        ({"dropout_rate": -1}, "dropout_rate must be a number of at least 0: got -1"),
        ({"tie_word_embeddings": 3}, "tie_word_embeddings must be true or false: got 3"),
        ({"relative_attention_num_buckets": 7}, r"config\.json: RelativePositions need num_buckets a multiple of 4"),
        ({"d_ff": 21}, r"wi\.weight must have the shape \[21, 24\], as config\.json says: got \[20, 24\]"),
        ({"vocab_size": 41}, r"shared\.weight must have the shape \[41, 24\]"),
        ({"num_experts": 5}, r"must hold the tensor .*expert_4\.wi\.weight: it is missing"),
        ({"num_layers": 3, "encoder_sparse_step": 2}, r"tensors only: encoder\.block\.3\..* is none of them"),
        ({"tie_word_embeddings": False}, r"must hold the tensor lm_head\.weight"),
        ({"moekit": {"bias": 3}}, "Remove it to read the folder as any other"),
    ],
)
def test_configurations(folder: Path, changes: dict[str, Any], message: str) -> None:
    change(folder, **changes)
    with pytest.raises(UserError, match=message):
        import_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_attention_heads": 2}, "Encoder and decoder must have as many heads"),
        ({"encoder_attention_heads": 5, "decoder_attention_heads": 5}, "divisible by encoder_attention_heads: got 24"),
        ({"second_expert_policy": "none"}, "one of all, sampling, random: got 'none'"),
        ({"moe_eval_capacity_token_fraction": 0.25}, "depends on what it is batched with. Import it dropless"),
    ],
)
def test_configurations_of_nllb(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save(nllb(), tmp_path / "model")
    change(folder, **changes)
    with pytest.raises(UserError, match=message):
        import_model(folder)
    if "moe_eval_capacity_token_fraction" in changes:
        assert import_model(folder, dropless=True).architecture.limit is None


def test_tables_that_contradict_the_configuration(folder: Path) -> None:
    reweigh(folder, lambda weights: weights.update({"lm_head.weight": weights["shared.weight"].clone()}))
    import_model(folder)
    reweigh(folder, lambda weights: weights["lm_head.weight"].add_(1))
    with pytest.raises(
        UserError, match=r"shared\.weight and lm_head\.weight must be equal, as tie_word_embeddings says"
    ):
        import_model(folder)


def test_tensors_of_an_unknown_type_or_place(folder: Path) -> None:
    reweigh(folder, lambda weights: weights.update({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}))
    with pytest.raises(UserError, match="a has the type F8_E4M3; known are F64"):
        import_model(folder)
    with pytest.raises(ValueError, match="was not loaded from a file"):
        map_fake(folder, {"a": torch.zeros(2)})


def test_a_mapped_tensor(folder: Path) -> None:
    """Shapes, parts, types and odd offsets; writing changes no file."""
    tensors = {
        "byte": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(4, 3).bfloat16(),
        "long": torch.arange(6).view(2, 3),
        "none": torch.zeros(0, 4),
    }
    path = folder / "some.safetensors"
    save_file(tensors, path)
    found = read_safetensors(path)
    for name, tensor in tensors.items():
        assert torch.equal(found[name].tensor(), tensor), name
        assert found[name].numel == tensor.numel()
    for i in (0, 3, -1):
        assert torch.equal(found["half"][i].tensor(), tensors["half"][i])
    assert torch.equal(found["long"][1][2].tensor(), torch.tensor(5))
    with pytest.raises(IndexError, match="index 4 is out of range for 4"):
        found["half"][4]
    before = path.read_bytes()
    found["long"].tensor().fill_(7)
    assert path.read_bytes() == before
    shifted = folder / "odd"
    shifted.write_bytes(b"!" + before)
    odd = dataclasses.replace(found["long"], path=shifted, offset=found["long"].offset + 1)
    assert torch.equal(odd.tensor(), tensors["long"])
