"""Randomly initialised models of transformers, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit.huggingface import Imported
from moekit.inference import Generation, LengthLimit, Search, generate
from moekit.transformer import EncoderDecoder

pytest.importorskip("transformers", reason="the exchange is with transformers, of the extra test")
from transformers import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

V, S, T = 40, 11, 9

SWITCH = {
    "vocab_size": V, "d_model": 24, "d_kv": 5, "d_ff": 20, "num_heads": 3, "num_layers": 4, "num_decoder_layers": 3,
    "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1, "num_experts": 4, "expert_capacity": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip
NLLB = {
    "vocab_size": V, "d_model": 24, "encoder_layers": 4, "decoder_layers": 2, "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_sparse_step": 2,
    "decoder_sparse_step": 2, "num_experts": 5,
}  # fmt: skip


def shake(model: nn.Module) -> nn.Module:
    """The model with weights that make all of its parts matter: biases, norms and relative positions included."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            elif "relative" in name or "classifier" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def switch(**changes: Any) -> SwitchTransformersForConditionalGeneration:
    return shake(SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**(SWITCH | changes))))


def nllb(**changes: Any) -> NllbMoeForConditionalGeneration:
    return shake(NllbMoeForConditionalGeneration(NllbMoeConfig(**(NLLB | changes))))


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def as_their_router_means(patch: pytest.MonkeyPatch) -> None:
    """NllbMoe's sparse layer with the sum that its router's weights say: its own runs experts 0 and 1 only."""

    def forward(self: Any, hidden: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weight, _ = self.router(flat, padding_mask)
        kept = 1 - self.experts.moe_token_dropout
        out = sum(kept * weight[:, e, None] * self.experts[f"expert_{e}"](flat) for e in range(self.num_experts))
        return out.view_as(hidden)

    patch.setattr(NllbMoeSparseMLP, "forward", forward)


def sentences(pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Source, its mask (padding on the right), target; two of the source's rows repeat words, to fill experts."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(4, V, (3, S), generator=generator)
    source[0] = source[0, 0]
    mask = torch.arange(S) < torch.tensor([S, 6, 9])[:, None]
    return source.masked_fill(~mask, pad), mask, torch.randint(4, V, (3, T), generator=generator)


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    source, mask, target = sentences(model.config.pad_token_id)
    return model(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits


@torch.no_grad()
def our_logits(model: EncoderDecoder) -> Tensor:
    source, mask, target = sentences(model.pad_id)
    memory = model.eval().encode(source, mask).hidden
    return model.logits(model.decode(target, memory, mask).hidden)


def their_texts(model: Any, count: int = 12, **options: Any) -> list[list[int]]:
    """What transformers writes, up to and with the end."""
    source, mask, _ = sentences(model.config.pad_token_id)
    given = {"do_sample": False, "num_beams": 1, "max_new_tokens": count} | options
    rows = model.generate(input_ids=source, attention_mask=mask.long(), **given)[:, 1:].tolist()
    end = model.generation_config.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def our_texts(found: Imported, count: int = 12, search: Search | None = None, **options: Any) -> Generation:
    source, mask, _ = sentences(found.tokens.pad)
    limit = LengthLimit(count, 0.0)
    return generate(found.model, source, mask, limit=limit, tokens=found.tokens, search=search, **options)
