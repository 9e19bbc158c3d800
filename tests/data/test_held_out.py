"""The text that a run keeps gives the batches that its corpus gives, and nothing else."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import TinySource

from moekit.data.batch import Batch
from moekit.data.held_out import HeldOut, HeldOutData, remarks
from moekit.data.module import MultitaskData, TaskData
from moekit.data.tokenizer import TokenizerOptions
from moekit.errors import UserError
from moekit.source import Direction, Split

OPTIONS: dict[str, Any] = {
    "vocab_size": 400, "tokens_per_step": 400, "evaluation_tokens": 300, "max_length": 20, "seed": 3, "progress": False,
}  # fmt: skip
WIDE = "\N{FULLWIDTH QUESTION MARK}"
SETTINGS = {"data.source": "tiny", "data.directions": None, "data.babel_sentences": 7}


def made(cache: Path, tasks: list[str], **options: Any) -> MultitaskData:
    return MultitaskData(TinySource(), tasks={name: TaskData() for name in tasks}, cache=cache, **OPTIONS | options)


def written(held_out: HeldOut, path: Path) -> HeldOut:
    with path.open("wb") as file:
        held_out.write(file)
    return HeldOut.read(path)


def equal(one: Batch, two: Batch) -> bool:
    left, right = vars(one), vars(two)
    return left.keys() == right.keys() and all(
        torch.equal(left[k], right[k]) if isinstance(left[k], torch.Tensor) else left[k] == right[k] for k in left
    )


@pytest.mark.parametrize("limits", [{}, {"valid_sentences": 7, "test_sentences": 5}])
@pytest.mark.parametrize(
    "tasks", [["translation", "denoising", "masked_lm", "replaced_token"], ["causal_lm"], ["span_corruption"]]
)
def test_batches_are_those_of_the_corpus(tasks: list[str], limits: dict[str, int], tmp_path: Path) -> None:
    data = made(tmp_path / "cache", tasks, **limits)
    source = written(HeldOut.of(data, SETTINGS), tmp_path / "kept")
    assert source.settings == SETTINGS
    kept = HeldOutData(source, tasks=data.tasks, tokenizer=data.tokenizer, cache=tmp_path / "none", **OPTIONS, **limits)
    for loader in ("val_dataloader", "test_dataloader"):
        ours, theirs = list(getattr(kept, loader)()), list(getattr(data, loader)())
        assert len(ours) == len(theirs) > 1
        assert all(equal(one, two) for one, two in zip(ours, theirs, strict=True))
    for direction in data.directions:
        kept_pairs, pairs = kept.pairs(direction, "test"), data.pairs(direction, "test")
        assert list(kept_pairs) == list(pairs)[: limits.get("test_sentences")]
    assert (kept.languages, kept.directions) == (data.languages, data.directions)
    assert kept.summary() == data.summary()
    assert not (tmp_path / "none").exists(), "no cache is written"


def test_what_is_said_of_the_corpus(tmp_path: Path) -> None:
    data = made(tmp_path / "cache", ["translation", "denoising"], valid_sentences=4)
    kept = written(HeldOut.of(data, SETTINGS), tmp_path / "kept")
    assert kept.corpus.fingerprint == data.source.fingerprint()
    assert kept.corpus.sentences["train/aa-bb/source"] == 400
    assert kept.corpus.sentences["valid/aa"] == 40
    assert kept.limits == {"valid": 4, "test": None}
    assert kept.tasks == ("translation", "denoising")
    assert kept.fingerprint() == HeldOut.of(data, SETTINGS).fingerprint()
    assert kept.fingerprint() != HeldOut.of(data, {}).fingerprint()
    assert kept.name == "tiny"
    file = io.BytesIO()
    kept.write(file)
    assert file.getvalue() == (tmp_path / "kept").read_bytes(), "the same text is the same file"


def test_references_that_no_model_can_write_are_named(tmp_path: Path) -> None:
    """NFKC makes narrow signs of wide ones, in what is written and not in what it is compared with."""

    class Wide(TinySource):
        def _lines(self, language: str, split: Split) -> list[str]:
            mark = WIDE * (language == "cc")
            return [line + mark * (number % 2) for number, line in enumerate(super()._lines(language, split))]

    options = {"tasks": {"translation": TaskData()}, "cache": tmp_path, **OPTIONS, "test_sentences": 10}
    said = remarks(MultitaskData(Wide(), **options), None)
    assert [line.partition(". No translation")[0] for line in said] == [
        f"Test references in cc with characters that the tokenizer cannot write ({WIDE}): 5 of 10"
    ]
    plain = TokenizerOptions(normalization="identity")
    assert remarks(MultitaskData(Wide(), **options, tokenizer_options=plain), None) == []
    lm = {**options, "tasks": {"causal_lm": TaskData()}}
    assert remarks(MultitaskData(Wide(), **lm), None) == [], "which is not scored by what it writes"


def test_it_holds_nothing_to_train_on(tmp_path: Path) -> None:
    data = made(tmp_path / "cache", ["translation"])
    source = HeldOut.of(data, SETTINGS)
    kept = HeldOutData(source, tokenizer=data.tokenizer, **OPTIONS)
    with pytest.raises(UserError, match="training needs the corpus"):
        kept.train_dataloader()
    with pytest.raises(UserError, match=r"got train/aa-bb/source, .* Training needs its corpus"):
        source.parallel(Direction("aa", "bb"), "train")
    with pytest.raises(UserError, match="got valid/aa"):
        source.monolingual("aa", "valid")
    with pytest.raises(TypeError, match="needs the run's tokenizer"):
        HeldOutData(source, **OPTIONS)
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        pickle.dumps(kept.store)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    kept = written(HeldOut.of(made(tmp_path / "cache", ["translation"]), SETTINGS), path)
    whole = path.read_bytes()
    content = json.loads(gzip.decompress(whole))
    other = {**content, "texts": [["another sentence"], *content["texts"][1:]]}
    for damaged in (
        whole[: len(whole) // 2], b"", whole[:200] + b"\xff\x00" * 20 + whole[240:], b"no gzip",
        gzip.compress(b"{}"), gzip.compress(json.dumps(other).encode()),
        gzip.compress(json.dumps({**content, "format": 9}).encode()),
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{path} must hold .* Take it from a copy of the run"):
            HeldOut.read(path)
    assert kept.languages == ("aa", "bb", "cc")
