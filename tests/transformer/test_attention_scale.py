"""What T5 and NLLB do otherwise: unscaled logits, unscaled embeddings, dropout at the end, sines before cosines."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import DIM, HEADS, VOCAB, run, seq2seq

from moekit.testing import assert_close, seeded
from moekit.transformer import EncoderDecoder, SplitSinusoidalPositions, TokenEmbedding, init_weights


@torch.no_grad()
def fold(model: EncoderDecoder, factor: float) -> None:
    for stack in (model.encoder, model.decoder):
        for block in stack.blocks:
            block.self_attention.qkv.weight[0] *= factor
            if block.cross_attention is not None:
                block.cross_attention.q.weight *= factor


@torch.no_grad()
def test_a_scale_of_attention_is_a_factor_on_queries() -> None:
    scaled, free = seq2seq().eval(), seq2seq(attention_scale=1.0).eval()
    free.load_state_dict(scaled.state_dict())
    with pytest.raises(AssertionError):
        assert_close(run(free)[0], run(scaled)[0])
    fold(free, (DIM // HEADS) ** -0.5)
    assert_close(run(free)[0], run(scaled)[0])


@torch.no_grad()
def test_unscaled_queries_start_smaller() -> None:
    """With the scale of your choice the logits start as they do with 1 / sqrt(head_dim)."""
    scaled, free = (EncoderDecoder(VOCAB, 64, 1, 1, 1, 8, attention_scale=scale) for scale in (None, 1.0))
    for model in (scaled, free):
        with seeded(3):
            init_weights(model)
    for name in ("encoder.layers.0.self_attention", "decoder.layers.0.self_attention"):
        a, b = (model.get_submodule(name).qkv.weight for model in (scaled, free))
        assert_close(b[0], a[0] / 8)
        assert torch.equal(b[1:], a[1:])
    a, b = (model.decoder.blocks[0].cross_attention.q.weight for model in (scaled, free))
    assert_close(b, a / 8)


@torch.no_grad()
def test_final_dropout_acts_in_training_and_on_what_the_norm_gives() -> None:
    model = seq2seq(final_dropout=0.5)
    with torch.no_grad():
        model.encoder.norm.bias.fill_(3.0)
        model.encoder.norm.weight.zero_()
    ids = torch.arange(3, 13)[None]
    hidden = model.train().encode(ids).hidden
    assert set(hidden.unique().tolist()) == {0.0, 6.0}
    assert (model.eval().encode(ids).hidden == 3.0).all()


def test_an_embedding_without_scale() -> None:
    table = TokenEmbedding(11, 16, scale="none")
    with torch.no_grad():
        table.weight.normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.arange(11)
    assert torch.equal(table(ids), table.weight)
    assert_close(table.logits(table.weight), table.weight @ table.weight.t())
    assert table.std == 0.25
    with pytest.raises(ValueError, match='must be "input", "output" or "none": got \'both\''):
        TokenEmbedding(11, 16, scale="both")  # type: ignore[arg-type]


@pytest.mark.parametrize(("dim", "first"), [(8, 0), (9, 2)])
def test_sines_before_cosines_by_the_formula(dim: int, first: int) -> None:
    table = SplitSinusoidalPositions(first=first).embed(torch.zeros(1, 5, dim), torch.arange(5))[0]
    half = dim // 2
    for place in range(5):
        angles = [(place + first) * math.exp(-math.log(10_000) * i / (half - 1)) for i in range(half)]
        row = [math.sin(a) for a in angles] + [math.cos(a) for a in angles] + [0.0] * (dim % 2)
        torch.testing.assert_close(table[place], torch.tensor(row), atol=1e-5, rtol=1e-5)


def test_split_sines_refuse_what_has_no_rate() -> None:
    with pytest.raises(ValueError, match="at least 4 channels: got 3"):
        SplitSinusoidalPositions().embed(torch.zeros(1, 2, 3), torch.arange(2))
    with pytest.raises(ValueError, match="first must be at least 0: got -1"):
        SplitSinusoidalPositions(first=-1)
