from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.plugins import MixedPrecision
from tiny_corpus import TinySource
from torch.utils import _pytree

from moekit.data.batch import Batch, Sentences, labelled_batch, pair_batch
from moekit.data.ragged import Ragged
from moekit.data.tokenizer import Tokenizer, train_tokenizer
from moekit.tasks import CausalLMTask, DenoisingTask, TranslationTask

A, B, C = 50, 60, 70
TWO = Ragged.of([[A, B], [C]])
ONE = Ragged.of([[A], [B, C, A]])
EN, DE = np.array([0, 1]), np.array([1, 2])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path_factory.mktemp("cache"))


def sentences(tokenizer: Tokenizer, *texts: Ragged, direction: str | None = None) -> Sentences:
    texts = texts or (TWO, ONE)
    lengths = tuple(text.lengths for text in texts)
    languages = (EN, EN.copy() if len(texts) == 1 else DE)
    return Sentences(texts, lengths, languages, np.zeros(2, np.uint64), tokenizer, direction=direction)


def tags(tokenizer: Tokenizer) -> tuple[int, int, int]:
    return tokenizer.tag_id("aa"), tokenizer.tag_id("bb"), tokenizer.tag_id("cc")


def test_translation_frames_both_sides(tokenizer: Tokenizer) -> None:
    _, bb, cc = tags(tokenizer)
    batch = TranslationTask().collate(sentences(tokenizer))
    assert batch.source.tolist() == [[bb, A, B, 2], [cc, C, 2, 0]]
    assert batch.source_mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert batch.target is not None
    assert batch.target_mask is not None
    assert batch.target.tolist() == [[1, A, 2, 0, 0], [1, B, C, A, 2]]
    assert batch.target_mask.tolist() == [[True, True, True, False, False], [True] * 5]
    assert batch.labels is None
    assert (batch.source_language.tolist(), batch.target_language.tolist()) == ([0, 1], [1, 2])
    assert (batch.num_tokens, batch.num_positions, len(batch)) == (7 + 8, 8 + 10, 2)


def test_a_text_that_is_cut_has_no_end_to_learn(tokenizer: Tokenizer) -> None:
    """The first row goes on behind what is here, the second does not; a source keeps its eos, which nobody predicts."""
    _, bb, cc = tags(tokenizer)
    cut = np.array([True, False])
    batch = TranslationTask().collate(dataclasses.replace(sentences(tokenizer), cut=(cut, cut)))
    assert batch.source.tolist() == [[bb, A, B, 2], [cc, C, 2, 0]]
    assert batch.target is not None
    assert batch.target.tolist() == [[1, A, 0, 0, 0], [1, B, C, A, 2]]
    assert batch.predicted is not None
    assert batch.target[:, 1:].flatten()[batch.predicted].tolist() == [A, B, C, A, 2]
    for task in (CausalLMTask(), DenoisingTask()):
        batch = task.collate(dataclasses.replace(sentences(tokenizer, TWO), cut=(cut,)))
        assert batch.target is not None
        assert batch.predicted is not None
        assert batch.target[:, 1:].flatten()[batch.predicted].tolist() == [A, B, C, 2]


def test_a_sentinel_ends_the_source_and_begins_the_target(tokenizer: Tokenizer) -> None:
    _, bb, cc = tags(tokenizer)
    mark = tokenizer.sentinel_ids[0]
    batch = TranslationTask(sentinel=True).collate(sentences(tokenizer))
    assert batch.source.tolist() == [[bb, A, B, mark, 2], [cc, C, mark, 2, 0]]
    assert batch.target is not None
    assert batch.target.tolist() == [[1, mark, A, 2, 0, 0], [1, mark, B, C, A, 2]]


def test_denoising_is_translation_to_itself(tokenizer: Tokenizer) -> None:
    aa, bb, _ = tags(tokenizer)
    batch = pair_batch("denoising", sentences(tokenizer, TWO), Ragged.of([[A, 4], [4]]), TWO)
    assert batch.task == "denoising"
    assert batch.source.tolist() == [[aa, A, 4, 2], [bb, 4, 2, 0]]
    assert batch.target is not None
    assert batch.target.tolist() == [[1, A, B, 2], [1, C, 2, 0]]
    assert batch.source_language.tolist() == batch.target_language.tolist() == [0, 1]


@pytest.mark.parametrize("task", ["masked_lm", "replaced_token"])
def test_labels_line_up_with_the_source(task: str, tokenizer: Tokenizer) -> None:
    aa, bb, _ = tags(tokenizer)
    batch = labelled_batch(task, sentences(tokenizer, TWO), Ragged.of([[A, 4], [4]]), Ragged.of([[-100, B], [C]]))
    assert batch.task == task
    assert batch.source.tolist() == [[aa, A, 4, 2], [bb, 4, 2, 0]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[-100, -100, B, -100], [-100, C, -100, -100]]
    assert batch.target is None
    assert batch.num_tokens == 7


def test_causal_lm_has_one_side(tokenizer: Tokenizer) -> None:
    batch = CausalLMTask().collate(sentences(tokenizer, TWO))
    assert batch.source.tolist() == [[1, A, B, 2], [1, C, 2, 0]]
    assert batch.target is not None
    assert torch.equal(batch.source, batch.target)
    assert (batch.num_tokens, batch.num_positions) == (7, 8)


def test_a_width_pads_further_but_never_cuts(tokenizer: Tokenizer) -> None:
    batch = pair_batch("translation", sentences(tokenizer), TWO, ONE, (6, 2))
    assert batch.target is not None
    assert (batch.source.shape[1], batch.target.shape[1]) == (6, 5)
    assert int(batch.source_mask.sum()) == 7


def test_a_batch_without_rows_has_its_shape(tokenizer: Tokenizer) -> None:
    none, no_text = np.zeros(0, dtype=np.int64), Ragged.of([])
    rows = Sentences((no_text,), (none,), (none, none.copy()), np.zeros(0, np.uint64), tokenizer)
    batch = labelled_batch("masked_lm", rows, no_text, no_text, 5)
    assert batch.source.shape == (0, 5)
    assert batch.num_tokens == 0


def test_tensors_have_the_types_of_the_contract(tokenizer: Tokenizer) -> None:
    batch = labelled_batch("masked_lm", sentences(tokenizer, TWO), TWO, TWO)
    assert batch.source.dtype == batch.source_language.dtype == torch.int64
    assert batch.source_mask.dtype == torch.bool
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64


def make(tokenizer: Tokenizer) -> Batch:
    return TranslationTask().collate(sentences(tokenizer, direction="aa-bb"))


def test_a_batch_is_a_pytree_of_its_tensors(tokenizer: Tokenizer) -> None:
    batch = make(tokenizer)
    leaves, _ = _pytree.tree_flatten({"translation": batch})
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 7
    again = _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor * 2, {"translation": batch})["translation"]
    assert (again.task, again.direction, again.labels) == ("translation", "aa-bb", None)
    assert torch.equal(again.source, batch.source * 2)


def test_to_moves_every_tensor_and_keeps_the_rest(tokenizer: Tokenizer) -> None:
    moved = make(tokenizer).to("meta")
    assert moved.source.is_meta
    assert moved.target is not None
    assert moved.target.is_meta
    assert (moved.task, moved.direction, moved.labels) == ("translation", "aa-bb", None)


def test_lightning_moves_and_converts_a_step(tokenizer: Tokenizer) -> None:
    step: Any = {"translation": make(tokenizer)}
    moved = move_data_to_device(step, torch.device("meta"))
    assert moved["translation"].source.is_meta
    converted = MixedPrecision("bf16-mixed", "cpu").convert_input(step)
    assert torch.equal(converted["translation"].source, step["translation"].source)
    assert converted["translation"].source.dtype == torch.int64
