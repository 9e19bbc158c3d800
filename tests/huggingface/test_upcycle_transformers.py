"""Dense models of transformers, upcycled: the same function at first, and folders of the sparse architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adoptable import COMMON, V, generated, tokens, transformers
from torch import Tensor

from moekit.errors import UserError
from moekit.experts import AddNoise
from moekit.huggingface import AdoptedLayer, upcycle

T5: dict[str, Any] = {
    "vocab_size": V, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 4, "num_decoder_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip


def shaken(kind: str, **config: Any) -> Any:
    torch.manual_seed(1)
    found = getattr(transformers, kind)(getattr(transformers, kind).config_class(**config))
    with torch.no_grad():
        for tensor in found.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return found.eval()


def llama(**more: Any) -> Any:
    return shaken("LlamaForCausalLM", **{**COMMON, **more})


def qwen3(**more: Any) -> Any:
    given = {**COMMON, "num_hidden_layers": 4, "head_dim": 6, "hidden_act": "gelu", **more}
    return shaken("Qwen3ForCausalLM", **given)


def t5(**more: Any) -> Any:
    return shaken("T5ForConditionalGeneration", **{**T5, **more})


def logits(found: Any) -> Tensor:
    ids = tokens()
    given = {"decoder_input_ids": ids} if found.config.is_encoder_decoder else {}
    with torch.no_grad():
        out: Tensor = found(ids, **given).logits
    return out


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], list[int]]] = {
    "llama": (lambda: llama(tie_word_embeddings=True), {"num_experts": 4, "k": 3}, [0, 1]),
    "llama, long": (
        lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}),
        {"num_experts": 3},
        [0, 1],
    ),
    "qwen3": (lambda: qwen3(attention_bias=True), {"num_experts": 6, "k": 2, "every": 2}, [1, 3]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_upcycled_model_is_the_dense_one_at_first(name: str, tmp_path: Path) -> None:
    make, options, sparse = CASES[name]
    dense = make()
    before, ids = logits(dense), tokens()
    text = generated(dense, ids[:, :4])
    embedding = dense.get_input_embeddings().weight
    ours = upcycle(dense, **options, aux=None)
    assert ours.get_input_embeddings().weight is embedding, "what stays is the same memory"
    assert [i for i, block in enumerate(ours.model.layers) if isinstance(block.mlp, AdoptedLayer)] == sparse
    torch.testing.assert_close(logits(ours), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(generated(ours, ids[:, :4]), text)

    ours.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == {"llama": "MixtralForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}[name.split(",")[0]]
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)
    ours.train()(ids, labels=ids).loss.backward()
    router = ours.model.layers[sparse[-1]].mlp.router.weight
    assert router.grad is not None


@pytest.mark.parametrize("every", [1, 2, 3])
def test_t5_becomes_a_switch(every: int, tmp_path: Path) -> None:
    dense = t5()
    before = logits(dense)
    ours = upcycle(dense, num_experts=4, every=every, scale=4.0, aux=None)
    sparse = [isinstance(block.layer[1].mlp, AdoptedLayer) for block in ours.encoder.block]
    assert sparse == [every == 1 or n % every == 1 for n in range(4)]
    again = copy.deepcopy(ours)
    with torch.no_grad():
        for layer in again.modules():
            if isinstance(layer, AdoptedLayer):
                layer.router.weight.zero_()  # whose probabilities are 1 / E
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "SwitchTransformersForConditionalGeneration"
    torch.testing.assert_close(logits(theirs), before, rtol=1e-5, atol=1e-5)


def test_copies_can_be_perturbed_and_seeds_repeat() -> None:
    one, two, other = (upcycle(llama(), 3, perturb=AddNoise(0.2), seed=s, aux=None) for s in (0, 0, 1))
    bank = one.model.layers[0].mlp.experts.gate_up_proj
    assert not torch.equal(bank[0], bank[1])
    assert torch.equal(logits(one), logits(two))
    assert not torch.equal(logits(one), logits(other))


def test_types_and_phases_are_kept() -> None:
    ours = upcycle(llama().to(torch.bfloat16).train(), 3, aux=None)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours.training
    assert all(module.training for module in ours.modules())


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no sparse architecture": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=1)),
        {},
        "GPT2LMHeadModel",
    ),
    "a base model": (lambda: llama().model, {}, "LlamaModel"),
    "biases": (lambda: llama(mlp_bias=True), {}, "mlp_bias"),
    "dense layers": (llama, {"every": 2}, "no dense feed-forwards"),
    "none sparse": (qwen3, {"every": 5}, "no layer of 4"),
    "windows": (lambda: qwen3(use_sliding_window=True), {}, "use_sliding_window"),
    "two of Switch": (t5, {"k": 2}, "1 expert"),
    "gated": (lambda: t5(feed_forward_proj="gated-gelu"), {}, "is_gated_act"),
    "unscaled": (lambda: t5(tie_word_embeddings=False), {}, "scale_decoder_outputs"),
    "one expert": (llama, {"num_experts": 1}, "at least 2"),
    "k": (llama, {"num_experts": 3, "k": 4}, "k=4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_sparse_form_is_refused_by_name(name: str) -> None:
    make, options, words = REFUSED[name]
    found = make()
    before = {path: id(p) for path, p in found.named_parameters()}
    with pytest.raises(UserError, match=words):
        upcycle(found, **options)
    assert {path: id(p) for path, p in found.named_parameters()} == before
