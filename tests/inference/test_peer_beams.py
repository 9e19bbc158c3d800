"""Beam search beside transformers' with the same weights: the same texts, the same scores, never a lower one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit import experts, routers
from moekit.huggingface import export_model
from moekit.inference import BeamSearch, Generation, Greedy, LengthLimit, MeanLogProb, generate
from moekit.layer import MoELayer
from moekit.transformer import EncoderDecoder, RMSNorm, every_other

DIM = 16


def make(seed: int) -> EncoderDecoder:
    """A small Switch Transformer; its vocabulary is small, and so the end of a text likely."""
    torch.manual_seed(seed)
    vocab = 6 + seed % 11

    def sparse(layer: int, side: str) -> nn.Module:
        return MoELayer(routers.switch(DIM, 4), experts.GroupedMLP(4, DIM, 24, init_scale=1.0))

    model = EncoderDecoder(
        vocab, DIM, 2, 2, 2, 24, feed_forward=every_other(sparse), norm=RMSNorm, tied=False
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embedding" not in name:
                weight.mul_(1.5)  # untrained models repeat one token
    return model


def sources(seed: int, vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (3,), generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    return torch.randint(3, vocab, (3, 6), generator=generator).masked_fill(~mask, 0), mask


def peer(model: EncoderDecoder, folder: Path) -> Any:
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    export_model(model, folder)
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def theirs(model: Any, seed: int, width: int, alpha: float, rule: Any, limit: int) -> tuple[list[list[int]], Tensor]:
    """Texts and scores of all beams of all sentences."""
    source, mask = sources(seed, model.config.vocab_size)
    found = model.generate(
        input_ids=source, attention_mask=mask.long(), num_beams=width, num_return_sequences=width, do_sample=False,
        length_penalty=alpha, early_stopping=rule, max_new_tokens=limit, min_new_tokens=None, suppress_tokens=[0],
        return_dict_in_generate=True, output_scores=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    texts = []
    for row in found.sequences[:, 1:].tolist():
        texts.append(row[: row.index(2) + 1] if 2 in row else [token for token in row if token])
    return texts, found.sequences_scores


def ours(model: EncoderDecoder, seed: int, width: int, alpha: float, rule: Any, limit: int) -> Generation:
    search = BeamSearch(width, num_return=width, penalty=MeanLogProb(alpha), early_stopping=rule)
    source, mask = sources(seed, model.vocab_size)
    return generate(model, source, mask, search=search, limit=LengthLimit(limit, 0.0))


def compare(seed: int, folder: Path) -> int:
    """Every rule and several widths and penalties, for one model; returns how many texts had ended."""
    model = make(seed)
    other = peer(model, folder)
    ended = 0
    for number, rule in enumerate((False, True, "never")):
        width, alpha, limit = 2 + (seed + number) % 4, (0.0, 0.6, 1.0, 2.0)[(seed + number) % 4], 4 + seed % 9
        texts, scores = theirs(other, seed, width, alpha, rule, limit)
        found = ours(model, seed, width, alpha, rule, limit)
        ended += int(found.ended.sum())
        assert (found.scores[:, 0] >= scores.view(3, width)[:, 0] - 1e-4).all()
        there = scores > -1e8  # transformers fills what it does not find
        torch.testing.assert_close(found.scores.flatten()[there], scores[there], rtol=1e-4, atol=1e-4)
        mine = [text for row in found.lists() for text in row]
        assert mine == [text for text, real in zip(texts, there.tolist(), strict=True) if real]
    return ended


def test_beams_are_those_of_transformers(tmp_path: Path) -> None:
    assert sum(compare(seed, tmp_path / str(seed)) for seed in range(2)) > 10


@pytest.mark.slow
def test_a_hundred_models_never_score_below_transformers(tmp_path: Path) -> None:
    for seed in range(2, 102):
        compare(seed, tmp_path / str(seed))


def test_greedy_texts_are_those_of_transformers(tmp_path: Path) -> None:
    model = make(7)
    other = peer(model, tmp_path)
    source, mask = sources(7, model.vocab_size)
    found = generate(model, source, mask, search=Greedy(), limit=LengthLimit(8, 0.0))
    texts = other.generate(
        input_ids=source, attention_mask=mask.long(), do_sample=False, num_beams=1, max_new_tokens=8,
        suppress_tokens=[0], eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    cut = [row[: row.index(2) + 1] if 2 in row else row for row in texts[:, 1:].tolist()]
    assert [text for row in found.lists() for text in row] == cut
