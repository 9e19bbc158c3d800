"""Padding on the left: the same logits and texts as transformers', and as the sentences alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import as_their_router_means, nllb, save, sentences, switch
from torch import Tensor

from moekit.huggingface import Imported, import_model
from moekit.inference import LengthLimit, generate
from moekit.testing import assert_close


def left(pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sentences of `sentences`, padded on the left."""
    source, mask, target = sentences(pad)
    moved = torch.stack([row.roll(int((~real).sum())) for row, real in zip(source, mask, strict=True)])
    return moved, mask.flip(1), target


MODELS: dict[str, Any] = {
    "nllb": lambda: nllb(),
    "nllb, other padding": lambda: nllb(pad_token_id=3),
    "nllb, dense": lambda: nllb(encoder_sparse_step=0, decoder_sparse_step=0),
    "switch": lambda: switch(expert_capacity=64),
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Imported]:
    theirs = MODELS[request.param]()
    as_their_router_means(monkeypatch)
    return theirs, import_model(save(theirs, tmp_path / "model"))


@torch.no_grad()
def test_logits_are_theirs_and_those_of_right_padding(pair: tuple[Any, Imported]) -> None:
    theirs, found = pair
    source, mask, target = left(theirs.config.pad_token_id)
    memory = found.model.eval().encode(source, mask).hidden
    ours = found.model.logits(found.model.decode(target, memory, mask).hidden)
    assert_close(ours, theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits)
    right, right_mask, _ = sentences(theirs.config.pad_token_id)
    again = found.model.encode(right, right_mask).hidden
    assert_close(memory[mask], again[right_mask])


def test_cached_generation_writes_what_theirs_does(pair: tuple[Any, Imported]) -> None:
    theirs, found = pair
    pad = found.tokens.pad
    source, mask, _ = left(pad)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 12, "suppress_tokens": [pad]}
    rows = theirs.generate(input_ids=source, attention_mask=mask.long(), **options)[:, 1:].tolist()
    end = theirs.generation_config.eos_token_id
    expected = [row[: row.index(end) + 1] if end in row else row for row in rows]
    for use_cache in (True, False):
        texts = generate(
            found.model, source, mask, limit=LengthLimit(12, 0.0), tokens=found.tokens, use_cache=use_cache
        )
        assert texts.best() == expected
