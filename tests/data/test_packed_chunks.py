"""Span corruption on packed chunks: every token once, in order, in chunks of one length; and the tasks' own noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import TinySource, stored

from moekit.data.batch import IGNORE, Batch
from moekit.data.module import MultitaskData, TaskData
from moekit.data.store import monolingual_section
from moekit.errors import UserError
from moekit.runs.settings import DataConfig, TaskConfig
from moekit.tasks import Masking, SpanCorruption, task_data

ROOM = 40


def data(cache: Path, *, packed: bool, name: str = "span_corruption", max_length: int = ROOM) -> MultitaskData:
    noise = SpanCorruption(packed=packed)
    return MultitaskData(
        TinySource(),
        tasks={name: TaskData(span_corruption=noise)},
        cache=cache,
        vocab_size=400,
        tokens_per_step=800,
        max_length=max_length,
        progress=False,
    )


def clean(batch: Batch, made: MultitaskData) -> list[list[int]]:
    """The texts before their spans were cut out."""
    tokenizer = made.tokenizer
    assert batch.target is not None
    assert batch.target_mask is not None
    out = []
    for row in range(len(batch)):
        source = batch.source[row, batch.source_mask[row]][1:-1].tolist()
        cut = batch.target[row, batch.target_mask[row]][1:-1].tolist()
        pieces: dict[int, list[int]] = {}
        for token in cut:
            if token in tokenizer.sentinel_ids:
                pieces[token] = []
            else:
                pieces[next(reversed(pieces))].append(token)
        out.append([token for place in source for token in pieces.get(place, [place])])
    return out


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_chunks_hold_every_token_of_a_language_in_order(cache: Path) -> None:
    made = data(cache, packed=True)
    length = SpanCorruption().chunk(ROOM - 2)
    loader = made.val_dataloader()
    batches = list(loader)
    for language in made.languages:
        found = [
            (int(place), row)
            for batch in batches
            if batch.direction == language
            for place, row in zip(batch.index, clean(batch, made), strict=True)  # type: ignore[arg-type]
        ]
        chunks = [row for _, row in sorted(found)]
        section = monolingual_section(language, "valid")
        text = [token for sentence in stored(made.store, section) for token in sentence]
        assert [token for chunk in chunks for token in chunk] == text
        assert {len(chunk) for chunk in chunks[:-1]} <= {length}
        assert 0 < len(chunks[-1]) <= length
    assert max(batch.source.shape[1] for batch in batches) == ROOM


def test_training_is_on_chunks_of_the_planned_size(cache: Path) -> None:
    made = data(cache, packed=True)
    length = SpanCorruption().chunk(ROOM - 2)
    damaged, cut = (int(n[0]) for n in SpanCorruption().lengths(np.array([length])))
    batch = next(iter(made.train_dataloader()))["span_corruption"]
    assert batch.source.shape[1] == damaged + 2 == ROOM
    assert batch.target is not None
    assert batch.target.shape[1] == cut + 2
    assert 0.7 * 800 < batch.num_positions <= 800
    spans = sum(int((batch.target == marker).sum()) for marker in made.tokenizer.sentinel_ids)
    assert (int(batch.target_mask.sum()) - 2 * len(batch) - spans) / spans == pytest.approx(3.0, abs=0.6)  # type: ignore[union-attr]


def test_sentence_by_sentence_stays_an_option(cache: Path) -> None:
    made = data(cache, packed=False)
    whole = {
        tuple(sentence)
        for language in made.languages
        for sentence in stored(made.store, monolingual_section(language, "train"))
    }
    batch = next(iter(made.train_dataloader()))["span_corruption"]
    assert all(tuple(row) in whole for row in clean(batch, made))


def test_too_many_spans_are_refused_when_the_data_are_made(cache: Path) -> None:
    with pytest.raises(UserError, match="Span corruption needs a sentinel for each span"):
        data(cache, packed=True, max_length=1000)


def test_masked_lm_keeps_a_tenth_and_draws_a_tenth(cache: Path) -> None:
    """80/10/10 of BERT for masked LM; of replaced-token detection the mask alone."""
    for name, least in (("masked_lm", 0.7), ("replaced_token", 1.0)):
        made = data(cache, packed=False, name=name)
        loader = iter(made.train_dataloader())
        batches = [next(loader)[name] for _ in range(12)]
        source = torch.cat([batch.source[batch.labels != IGNORE] for batch in batches])
        share = (source == made.tokenizer.mask_id).float().mean()
        assert least <= share <= least + (0.2 if least < 1 else 0.0)


def test_settings_of_recipes_reach_the_noise() -> None:
    config = DataConfig(mask_shares=(0.5, 0.25, 0.25), span_ratio=0.3, mean_span=4.0, packed=True, sentinel=True)
    names = ("masked_lm", "span_corruption", "replaced_token", "translation")
    made = task_data({name: TaskConfig(tokens=number) for number, name in enumerate(names, start=1)}, config)
    assert [data.share for data in made.values()] == [1.0, 2.0, 3.0, 4.0]
    assert made["masked_lm"].masking == Masking(replace=(0.5, 0.25, 0.25))
    assert made["span_corruption"].span_corruption == SpanCorruption(0.3, 4.0, True)
    assert made["replaced_token"] == TaskData(share=3.0)
    assert [data.sentinel for data in made.values()] == [False, False, False, True]
    with pytest.raises(UserError, match="noise of the task masked_lm in data: replace must be three shares"):
        task_data({"masked_lm": TaskConfig()}, DataConfig(mask_shares=(0.5, 0.0, 0.0)))
