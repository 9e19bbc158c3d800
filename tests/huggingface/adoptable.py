"""Small models of transformers for every sparse block that is adopted, and what adopted ones are compared by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.0", reason="adoption is of transformers 5")

V, PAD = 60, 0
COMMON: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "moe_intermediate_size": 20, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
GROUPED: dict[str, Any] = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
ONE: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}

# A plain one, then odd ones: one expert, k = E, one choice renormalised, several shared experts, no limit of groups.
CONFIGS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "MixtralSparseMoeBlock": (
        "MixtralConfig",
        [
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            {"num_local_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True},
            {"num_local_experts": 3, "num_experts_per_tok": 1, "hidden_act": "gelu", "sliding_window": 4},
        ],
    ),
    "OlmoeSparseMoeBlock": (
        "OlmoeConfig",
        [
            {"num_experts": 6, "num_experts_per_tok": 3},
            {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True},
            {"num_experts": 5, "num_experts_per_tok": 1, "hidden_act": "relu"},
        ],
    ),
    "Qwen2MoeSparseMoeBlock": (
        "Qwen2MoeConfig",
        [
            {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
            {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 12, "norm_topk_prob": True},
            {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
             "shared_expert_intermediate_size": 5},
        ],
    ),
    "Qwen3MoeSparseMoeBlock": (
        "Qwen3MoeConfig",
        [
            {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
            {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 8, "mlp_only_layers": [0]},
            {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "head_dim": 6},
        ],
    ),
    "DeepseekV2Moe": (
        "DeepseekV2Config",
        [
            {**LATENT, **GROUPED, "num_experts_per_tok": 2, "n_shared_experts": 2,
             "topk_method": "group_limited_greedy"},
            {**LATENT, **ONE, "num_experts_per_tok": 4, "n_shared_experts": 1, "routed_scaling_factor": 2.0},
            {**LATENT, **ONE, "num_experts_per_tok": 1, "n_shared_experts": 1, "q_lora_rank": 12},
        ],
    ),
    "DeepseekV3MoE": (
        "DeepseekV3Config",
        [
            {**LATENT, **GROUPED, "num_experts_per_tok": 3, "n_shared_experts": 1},
            {**LATENT, **ONE, "num_experts_per_tok": 4, "n_shared_experts": 2, "norm_topk_prob": False},
            {**LATENT, **ONE, "num_experts_per_tok": 1, "n_shared_experts": 1, "first_k_dense_replace": 0},
        ],
    ),
    "GptOssMLP": (
        "GptOssConfig",
        [
            {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
            {"num_local_experts": 3, "num_experts_per_tok": 3, "head_dim": 8, "swiglu_limit": 0.05},
            {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 6, "sliding_window": 4},
        ],
    ),
    "GraniteMoeMoE": (
        "GraniteMoeConfig",
        [
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            {"num_local_experts": 3, "num_experts_per_tok": 3, "residual_multiplier": 0.5},
            {"num_local_experts": 1, "num_experts_per_tok": 1},
        ],
    ),
    "PhimoeSparseMoeBlock": (
        "PhimoeConfig",
        [
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            {"num_local_experts": 6, "num_experts_per_tok": 2, "router_jitter_noise": 1.0, "attention_bias": True},
            {"num_local_experts": 2, "num_experts_per_tok": 2},
        ],
    ),
}  # fmt: skip
CASES = [(block, n) for block, (_, made) in CONFIGS.items() for n in range(len(made))]


def model(block: str = "Qwen3MoeSparseMoeBlock", number: int = 0, **more: Any) -> Any:
    """One of the configurations, with weights that make all parts matter."""
    kind, made = CONFIGS[block]
    torch.manual_seed(number)
    config = getattr(transformers, kind)(**{**COMMON, **made[number], **more})
    found = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in (*found.parameters(), *(b for name, b in found.named_buffers() if "correction" in name)):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return found.eval()


def tokens(seed: int = 5, *shape: int) -> Tensor:
    return torch.randint(3, V, shape or (2, 9), generator=torch.Generator().manual_seed(seed))


def left_padded() -> tuple[Tensor, Tensor]:
    """Tokens, and their mask: the first row begins with four of padding."""
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.int64)
    ids[0, :4], mask[0, :4] = PAD, 0
    return ids, mask


def gradients(found: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in found.named_parameters() if p.grad is not None}


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    a, b = gradients(one), gradients(other)
    assert list(a) == list(b)
    for name, grad in a.items():
        torch.testing.assert_close(b[name], grad, rtol=1e-4, atol=1e-5 * max(float(grad.abs().max()), 1e-3), msg=name)
        assert b[name].stride() == grad.stride(), f"{name}: another layout is copied by the optimizer"


def generated(found: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    out: Tensor = found.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    return out
