"""Folders of transformers opened by moekit: the same logits and the same greedy texts, for models of several shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import as_their_router_means, nllb, our_logits, our_texts, save, switch, their_logits, their_texts

from moekit.experts import GroupedMLP
from moekit.huggingface import import_model
from moekit.layer import MoELayer
from moekit.testing import assert_close

SWITCHES: dict[str, dict[str, Any]] = {
    "as is": {},
    "every layer sparse": {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3},
    "none sparse": {"num_sparse_encoder_layers": 9, "num_sparse_decoder_layers": 9},
    "their 0 is one sparse layer": {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0},
    "three tables": {"tie_word_embeddings": False},
    "gelu": {"dense_act_fn": "gelu_new", "layer_norm_epsilon": 1e-2},
    "silu, one head": {"dense_act_fn": "silu", "num_heads": 1, "d_kv": 24},
    "other buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6},
    "roomy": {"expert_capacity": 64},
    "one expert": {"num_experts": 1, "num_layers": 2, "num_decoder_layers": 2},
}
NLLBS: dict[str, dict[str, Any]] = {
    "as is": {},
    "every layer sparse": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "no output masking, before drop": {"moe_token_dropout": 0.0, "normalize_router_prob_before_dropping": True},
    "three tables": {"tie_word_embeddings": False},
    "no scale, gelu, other padding": {"scale_embedding": False, "activation_function": "gelu_new", "pad_token_id": 3},
    "odd width": {"d_model": 21, "encoder_attention_heads": 3, "decoder_attention_heads": 3},
}


@pytest.mark.parametrize("shape", SWITCHES)
def test_switch_transformers(shape: str, tmp_path: Path) -> None:
    theirs = switch(**SWITCHES[shape])
    found = import_model(save(theirs, tmp_path / "model"))
    assert_close(our_logits(found.model), their_logits(theirs))
    # Theirs may write padding, ours never does.
    assert our_texts(found).best() == their_texts(theirs, suppress_tokens=[0])
    sparse = {side: tuple(i for i, b in enumerate(getattr(theirs, side).block) if b.is_sparse) for side in SIDES}
    assert {side: getattr(found.architecture, f"{side}_sparse") for side in SIDES} == sparse


SIDES = ("encoder", "decoder")


@pytest.mark.parametrize("shape", NLLBS)
def test_nllb_moe_with_the_sum_that_its_router_means(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = nllb(**NLLBS[shape])
    found = import_model(save(theirs, tmp_path / "model"))
    asis = their_logits(theirs)
    as_their_router_means(monkeypatch)
    assert_close(our_logits(found.model), their_logits(theirs))
    assert our_texts(found).best() == their_texts(theirs, suppress_tokens=[found.tokens.pad])
    with pytest.raises(
        AssertionError
    ):  # transformers 5 as it is: when this fails, the note in import_model is out of date
        assert_close(our_logits(found.model), asis)


def test_nllb_moe_without_sparse_layers_needs_no_excuse(tmp_path: Path) -> None:
    theirs = nllb(encoder_sparse_step=0, decoder_sparse_step=0)
    found = import_model(save(theirs, tmp_path / "model"))
    assert_close(our_logits(found.model), their_logits(theirs))
    assert our_texts(found).best() == their_texts(theirs, suppress_tokens=[1])


def test_their_capacity_drops_by_sequence_and_can_be_left_out(tmp_path: Path) -> None:
    tight, roomy = switch(expert_capacity=1), switch(expert_capacity=1000)
    folder = save(tight, tmp_path / "tight")
    assert_close(our_logits(import_model(folder).model), their_logits(tight))
    assert_close(our_logits(import_model(folder, dropless=True).model), their_logits(roomy))
    with pytest.raises(AssertionError):
        assert_close(their_logits(tight), their_logits(roomy))


def test_shards_are_one_model(tmp_path: Path) -> None:
    theirs = switch()
    whole = import_model(save(theirs, tmp_path / "whole"))
    folder = save(theirs, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    for (name, a), b in zip(
        import_model(folder).model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_settings_of_training_come_along(tmp_path: Path) -> None:
    found = import_model(save(switch(dropout_rate=0.25, router_jitter_noise=0.125), tmp_path / "switch")).model
    stack = found.encoder
    layer = stack.blocks[1].feed_forward
    assert isinstance(layer, MoELayer)
    assert isinstance(layer.experts, GroupedMLP)
    rates = (stack.dropout, stack.final_dropout, stack.blocks[0].dropout, layer.experts.dropout)
    assert {*rates, stack.blocks[0].self_attention.dropout} == {0.25}
    assert layer.router.exploration.epsilon == 0.125
    found = import_model(
        save(nllb(dropout=0.25, attention_dropout=0.5, activation_dropout=0.125), tmp_path / "nllb")
    ).model
    layer = found.encoder.blocks[1].feed_forward
    assert (found.encoder.dropout, found.encoder.blocks[0].self_attention.dropout) == (0.25, 0.5)
    assert (layer.experts.dropout, layer.output_masking.probability) == (0.125, 0.2)
    assert found.encoder.final_dropout == 0


def test_the_type_of_the_weights(tmp_path: Path) -> None:
    theirs = switch().to(torch.bfloat16)
    folder = save(theirs, tmp_path / "model")
    stored = import_model(folder).model
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in stored.parameters()), "it can be trained"
    wide = import_model(folder, dtype=torch.float32).model
    assert_close(our_logits(wide), their_logits(theirs.float()))
