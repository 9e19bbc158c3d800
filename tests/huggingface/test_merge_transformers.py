"""Adopted models as dense ones: the way back of `upcycle`, averages, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adoptable import model, tokens
from hf_models import switch
from torch import Tensor

from moekit.errors import UserError
from moekit.experts import AddNoise
from moekit.huggingface import adopt, merge, upcycle

transformers = pytest.importorskip("transformers", minversion="5.0", reason="adoption is of transformers 5")
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}


def dense(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(T5 if kind == "T5" else SIZES))
    name = f"{kind}ForConditionalGeneration" if kind == "T5" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()


def logits(found: Any) -> Tensor:
    ids = tokens(5)
    given = {"decoder_input_ids": ids} if found.config.is_encoder_decoder else {}
    with torch.no_grad():
        return torch.as_tensor(found(ids, **given).logits)


@pytest.mark.parametrize(("kind", "every", "scale"), [("Llama", 1, 1.0), ("Qwen3", 2, 1.0), ("T5", 2, 4.0)])
def test_an_upcycled_model_comes_back(kind: str, every: int, scale: float, tmp_path: Path) -> None:
    first = dense(kind)
    back = merge(upcycle(first, 4, every=every, scale=scale, aux=None), scale=1 / scale)
    assert type(back) is type(first)
    assert torch.equal(logits(back), logits(first))
    back.save_pretrained(tmp_path)
    again = type(first).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(first))
    assert list(back.state_dict()) == list(first.state_dict())


def test_averages_are_weighted() -> None:
    sparse = upcycle(dense("Qwen3"), 3, perturb=AddNoise(0.5), aux=None)
    path = "model.layers.2.mlp"
    experts = sparse.get_submodule(path).experts
    load = {f"model.layers.{n}.mlp": torch.tensor([2.0, 0.0, 6.0]) for n in range(4)}
    found = merge(sparse, load).get_submodule(path)
    gate, up = experts.gate_up_proj.chunk(2, 1)
    for name, stacked in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down_proj)):
        wanted = 0.25 * stacked[0].double() + 0.75 * stacked[2].double()
        torch.testing.assert_close(found.get_submodule(name).weight.double(), wanted, rtol=1e-6, atol=1e-7)
    even = merge(sparse).get_submodule(path).down_proj.weight
    torch.testing.assert_close(even, experts.down_proj.mean(0))


def test_how_it_generates_is_kept(tmp_path: Path) -> None:
    sparse = upcycle(dense("Llama"), 3, aux=None)
    given = {"eos_token_id": [2, 4], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}
    sparse.generation_config = transformers.GenerationConfig(**given)
    merged = merge(sparse)
    merged.save_pretrained(tmp_path)
    again = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in given} == given
    merged.generation_config.temperature = 1.0
    assert sparse.generation_config.temperature == 0.6, "the first is as it was"


def test_what_no_dense_model_can_be_is_refused() -> None:
    with pytest.raises(UserError, match="no dense model that OlmoeForCausalLM could become: known are Mixtral"):
        merge(adopt(model("OlmoeSparseMoeBlock"), aux=None))
    with pytest.raises(UserError, match="no sliding window: got MixtralForCausalLM with sliding_window=4"):
        merge(adopt(model("MixtralSparseMoeBlock", 2), aux=None))
    with pytest.raises(UserError, match="feed-forwards of one width: got Qwen3MoeForCausalLM with experts of 8 and"):
        merge(adopt(model("Qwen3MoeSparseMoeBlock", 1), aux=None))
    sparse = upcycle(dense("Llama"), 3, aux=None)
    with pytest.raises(UserError, match="needs 3 numbers that are not negative and not all 0"):
        merge(sparse, {f"model.layers.{n}.mlp": torch.zeros(3) for n in range(4)})
    assert merge(adopt(switch(), aux=None)).config.d_ff == 20
