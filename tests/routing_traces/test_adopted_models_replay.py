"""Models of transformers: recorded, played again, and trained with the experts that their generation chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.errors import UserError
from moekit.huggingface import adopt, routings
from moekit.routing_traces import join_rollout, read_trace, record, replay

transformers = pytest.importorskip("transformers", minversion="5.0")

VOCABULARY = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


def olmoe() -> Any:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**SIZES, num_hidden_layers=2, num_experts=4)
    model = transformers.OlmoeForCausalLM(config)
    adopt(model)
    return model


def deepseek() -> Any:
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **SIZES, moe_intermediate_size=6, num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=4, n_group=2,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=4,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    adopt(model)
    return model


def trained(model: Any) -> list[float]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        ids = torch.randint(0, VOCABULARY, (4, 10), generator=data)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("make", [olmoe, deepseek])
def test_a_run_is_the_same_to_the_last_digit(make: Any, tmp_path: Path) -> None:
    """Also where the second run computes its activations again in backward."""
    model = make()
    with record(model, tmp_path / "t.npz"):
        losses = trained(model)
    again = make()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    with replay(again, read_trace(tmp_path / "t.npz")) as playing:
        assert trained(again) == losses
    assert playing.left == 0


def test_training_plays_what_generation_chose(tmp_path: Path) -> None:
    """Rollout routing replay: one forward over what was written, its experts those of the forwards that wrote it."""
    model = olmoe().eval()
    prompts = torch.randint(1, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(2))
    with record(model, tmp_path / "rollout.npz"):
        written = model.generate(prompts, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    rollout = read_trace(tmp_path / "rollout.npz")
    assert len(rollout) == 5
    whole = join_rollout(rollout, tmp_path / "whole.npz", rows=3)
    with pytest.raises(UserError, match="forwards of 5 rows must have as many tokens of each"):
        join_rollout(rollout, tmp_path / "no.npz", rows=5)
    # The same weights choose the same experts, token by token.
    with record(model, tmp_path / "plain.npz"):
        expected = model(input_ids=written[:, :-1]).logits
    plain = read_trace(tmp_path / "plain.npz")[0].layers
    assert len(whole) == 1
    for name, layer in whole[0].layers.items():
        for field in ("token", "expert", "position", "kept"):
            assert torch.equal(getattr(layer.routing, field), getattr(plain[name].routing, field)), field
        torch.testing.assert_close(layer.routing.weight, plain[name].routing.weight)
    # Another policy: its own experts would be others.
    for parameter in (p for name, p in model.named_parameters() if name.endswith("gate.weight")):
        torch.nn.init.normal_(parameter)
    model.train()
    with replay(model, whole), routings(model) as heard:
        logits = model(input_ids=written[:, :-1]).logits
    assert not torch.allclose(logits, expected)
    for routing, layer in zip(heard, whole[0].layers.values(), strict=True):
        assert torch.equal(routing.expert, layer.routing.expert)
    logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("gate.weight"))
