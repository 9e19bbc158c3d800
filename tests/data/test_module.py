from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from counted_calls import calls_of
from lightning.pytorch.cli import LightningCLI
from tiny_corpus import SIZES, TinySource

from moekit.data.batch import IGNORE, Batch
from moekit.data.mixture import LinearHeating
from moekit.data.module import MultitaskData, TaskData, default_cache
from moekit.data.streams import Rank
from moekit.data.tokenizer import TokenizerOptions
from moekit.errors import UserError
from moekit.source import Direction
from moekit.tasks import Denoising, Masking

TASKS = ("translation", "denoising", "span_corruption", "masked_lm", "replaced_token", "causal_lm")
ALL = {name: TaskData(share=4.0 if name == "translation" else 1.0) for name in TASKS}


class Ranked(MultitaskData):
    """As if a Trainer had said which of how many ranks this is."""

    rank = Rank()

    def _rank(self) -> Rank:
        return self.rank


def data(cache: Path, **changes: Any) -> Ranked:
    settings: dict[str, Any] = {"tasks": ALL, "vocab_size": 400, "tokens_per_step": 3200, "progress": False, **changes}
    made = Ranked(settings.pop("source", None) or TinySource(), cache=cache, **settings)
    made.rank = settings.get("rank", Rank())
    return made


def ranked(made: Ranked, index: int, count: int) -> Ranked:
    made.rank = Rank(index, count)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    data(folder).prepare_data()
    return folder


def real(batch: Batch, side: str = "source") -> list[tuple[int, ...]]:
    ids, mask = getattr(batch, side), getattr(batch, f"{side}_mask")
    return [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]


def steps(made: MultitaskData, count: int) -> list[dict[str, Batch]]:
    loader = iter(made.train_dataloader())
    return [next(loader) for _ in range(count)]


def test_a_step_has_a_batch_of_every_task_by_the_contract(cache: Path) -> None:
    made = data(cache)
    tokenizer = made.tokenizer
    (step,) = steps(made, 1)
    assert list(step) == list(TASKS)
    for name, batch in step.items():
        assert batch.task == name
        assert batch.direction is None
        assert torch.equal(batch.source_mask, batch.source != tokenizer.pad_id)
        assert (batch.source[torch.arange(len(batch)), batch.source_mask.sum(1) - 1] == tokenizer.eos_id).all()
        if batch.target is not None:
            assert (batch.target[:, 0] == tokenizer.bos_id).all()
        if name != "causal_lm":
            assert torch.equal(batch.source[:, 0], tokenizer.first_tag_id + batch.target_language)
    for name in ("masked_lm", "replaced_token"):
        labels = step[name].labels
        assert labels is not None
        masked = step[name].source == tokenizer.mask_id
        assert not bool((masked & (labels == IGNORE)).any())
        # BERT's leaves a tenth of them as they are and draws another tenth; the generator of ELECTRA sees masks alone.
        assert torch.equal(labels != IGNORE, masked) == (name == "replaced_token")
        assert ((labels != IGNORE).sum(1) >= 1).all()


def test_translation_pairs_belong_together(cache: Path) -> None:
    made = data(cache)
    known = {(str(d), *pair) for d in made.directions for pair in made.source.parallel(d, "train")}
    for step in steps(made, 5):
        batch = step["translation"]
        for i, (source, target) in enumerate(zip(real(batch), real(batch, "target"), strict=True)):
            names = [made.languages[int(ids[i])] for ids in (batch.source_language, batch.target_language)]
            assert ("-".join(names), made.tokenizer.decode(source), made.tokenizer.decode(target)) in known


def test_denoising_wants_the_clean_sentence_back(cache: Path) -> None:
    made = data(cache)
    clean = {language: set(made.source.monolingual(language, "train")) for language in made.languages}
    changed = 0
    for step in steps(made, 5):
        batch = step["denoising"]
        for i, (source, target) in enumerate(zip(real(batch), real(batch, "target"), strict=True)):
            assert made.tokenizer.decode(target) in clean[made.languages[int(batch.target_language[i])]]
            changed += source[1:-1] != target[1:-1]
    assert changed > 20


def test_tasks_share_the_budget(cache: Path) -> None:
    made = data(cache)
    for step in steps(made, 20):
        for name, batch in step.items():
            assert batch.num_positions <= 1.06 * 3200 * (0.5 if name == "translation" else 0.125)
    positions = [sum(batch.num_positions for batch in step.values()) for step in steps(made, 64)]
    assert np.mean(positions) == pytest.approx(0.95 * 3200, rel=0.07)


def test_summary_reports_padding_and_what_was_left_out(cache: Path) -> None:
    summary = data(cache).summary()
    assert list(summary) == list(TASKS)
    assert summary["translation"]["sentences"] == 6 * SIZES["train"]
    assert 0 <= summary["translation"]["padding"] < 0.15
    pairs = [(a, b) for d in TinySource().directions for a, b in TinySource().parallel(d, "train")]
    tokenizer = data(cache).tokenizer
    long = sum(max(len(tokenizer.encode(side)) for side in pair) > 18 for pair in pairs)
    dropping = data(cache, max_length=20).summary()["translation"]
    assert (dropping["dropped"], dropping["truncated"]) == (long, 0)
    cutting = data(cache, max_length=20, too_long="truncate").summary()["translation"]
    assert (cutting["dropped"], cutting["truncated"], cutting["sentences"]) == (0, long, 6 * SIZES["train"])
    for step in steps(data(cache, max_length=20, too_long="truncate"), 3):
        assert max(batch.source.shape[1] for batch in step.values()) <= 20


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_sentences_that_one_process_would_get(ranks: int, cache: Path) -> None:
    alone = steps(data(cache, tokens_per_step=6400), 4)
    shared = [steps(ranked(data(cache, tokens_per_step=6400), rank, ranks), 4) for rank in range(ranks)]
    for number, step in enumerate(alone):
        for name, whole in step.items():
            parts = [shared[rank][number][name] for rank in range(ranks)]
            for side in ("source", "target") if whole.target is not None else ("source",):
                rows: list[Any] = [None] * len(whole)
                for rank, part in enumerate(parts):
                    rows[rank::ranks] = real(part, side)
                assert rows == real(whole, side), f"{name} {side}: the same sentences, the same noise"
            if name not in ("denoising", "span_corruption"):  # their damaged side has another length on each rank
                assert {part.source.shape[1] for part in parts} == {whole.source.shape[1]}
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_every_rank_has_sentences_even_of_a_small_budget(cache: Path) -> None:
    made = [ranked(data(cache, tokens_per_step=1500, steps_per_epoch=64), rank, 6) for rank in range(6)]
    assert min(len(batch) for one in made for step in steps(one, 64) for batch in step.values()) >= 1


def test_sentences_without_tokens_are_left_out(tmp_path: Path) -> None:
    class Gaps(TinySource):
        def _lines(self, language: str, split: Any) -> list[str]:
            lines = super()._lines(language, split)
            return ["" if i % 10 == 3 and language == "bb" else line for i, line in enumerate(lines)]

    made = MultitaskData(Gaps(), cache=tmp_path, vocab_size=400, progress=False, steps_per_epoch=40)
    assert made.summary()["translation"]["dropped"] == 4 * SIZES["train"] // 10
    for step in steps(made, 40):
        assert step["translation"].target is not None
        assert min(map(len, real(step["translation"]) + real(step["translation"], "target"))) > 2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_anything(num_workers: int, cache: Path) -> None:
    for one, other in zip(steps(data(cache), 9), steps(data(cache, num_workers=num_workers), 9), strict=True):
        for name, batch in one.items():
            assert torch.equal(batch.source, other[name].source)


def test_loading_data_leaves_the_global_generator_alone(cache: Path) -> None:
    made = data(cache)
    before = torch.get_rng_state()
    steps(made, 2)
    assert len(list(made.val_dataloader())) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_padded_lengths_can_be_multiples(cache: Path) -> None:
    for step in steps(data(cache, pad_multiple=8), 4):
        for batch in step.values():
            assert batch.source.shape[1] % 8 == 0
            assert batch.target is None or batch.target.shape[1] % 8 == 0


def test_an_epoch_shows_the_first_task_about_once(cache: Path) -> None:
    loader = data(cache).train_dataloader()
    rows = sum(len(step["translation"]) for step in loader)
    assert rows == pytest.approx(6 * SIZES["train"], rel=0.03)
    assert len(data(cache, steps_per_epoch=11).train_dataloader()) == 11
    assert sum(1 for _ in data(cache, steps_per_epoch=11).train_dataloader()) == 11


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_shows_every_sentence_once_in_order(ranks: int, cache: Path) -> None:
    made = data(cache)
    per_rank = [list(ranked(made, rank, ranks).test_dataloader()) for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    seen: dict[str, list[int]] = {}
    order = []
    for together in zip(*per_rank, strict=True):
        assert len({batch.direction for batch in together}) == 1
        order.append((together[0].direction, max(batch.source.shape[1] for batch in together)))
        for batch in together:
            assert batch.task == "translation"
            assert batch.direction is not None
            assert batch.index is not None
            pairs = made.pairs(batch.direction, "test")
            for i, source, target in zip(batch.index.tolist(), real(batch), real(batch, "target"), strict=True):
                seen.setdefault(batch.direction, []).append(i)
                assert (made.tokenizer.decode(source), made.tokenizer.decode(target)) == pairs[i]
    assert {name: sorted(found) for name, found in seen.items()} == {
        str(direction): list(range(SIZES["test"])) for direction in made.directions
    }
    names = [str(direction) for direction in made.directions]
    assert order == sorted(order, key=lambda entry: (names.index(entry[0]), entry[1])), "by direction, short ones first"


def test_more_ranks_than_sentences_give_some_ranks_empty_batches(cache: Path) -> None:
    made = data(cache, test_sentences=3)
    per_rank = [list(ranked(made, rank, 5).test_dataloader()) for rank in range(5)]
    assert {len(batches) for batches in per_rank} == {6}
    assert [len(batches[0]) for batches in per_rank] == [1, 1, 1, 0, 0]


def test_validation_covers_all_tasks_with_noise_that_never_changes(cache: Path) -> None:
    made = data(cache, valid_sentences=10)
    once, again = list(made.val_dataloader()), list(data(cache, valid_sentences=10).val_dataloader())
    assert len(once) == len(again)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one.source, other.source)
    counted: dict[tuple[str, str | None], int] = {}
    for batch in once:
        counted[batch.task, batch.direction] = counted.get((batch.task, batch.direction), 0) + len(batch)
    texts = [(task, language) for task in TASKS if task != "translation" for language in made.languages]
    assert counted == dict.fromkeys([*(("translation", str(d)) for d in made.directions), *texts], 10)
    assert [batch.task for batch in once] == sorted((b.task for b in once), key=list(TASKS).index)


def test_evaluation_cuts_what_training_would_drop(cache: Path) -> None:
    made = data(cache, max_length=8)
    assert sum(len(batch) for batch in made.test_dataloader()) == 6 * SIZES["test"]
    assert max(batch.source.shape[1] for batch in made.test_dataloader()) == 8


def test_a_source_without_evaluation_splits_has_no_evaluation_batches(tmp_path: Path) -> None:
    class TrainOnly(TinySource):
        def _lines(self, language: str, split: Any) -> list[str]:
            return super()._lines(language, split) if split == "train" else []

    made = MultitaskData(TrainOnly(), cache=tmp_path, vocab_size=400, progress=False)
    assert made.val_dataloader() == made.test_dataloader() == []


def test_streams_and_shares_choose_what_a_task_sees(cache: Path) -> None:
    tasks = {
        "translation": TaskData(streams=("aa-bb", "aa-cc"), stream_shares={"aa-cc": 0.75}),
        "denoising": TaskData(streams=("bb",)),
    }
    made = data(cache, tasks=tasks, steps_per_epoch=64)
    assert [str(direction) for direction in made.directions] == ["aa-bb", "aa-cc"]
    targets: list[int] = []
    for step in steps(made, 64):
        targets += step["translation"].target_language.tolist()
        assert set(step["translation"].source_language.tolist()) == {0}
        assert set(step["denoising"].source_language.tolist()) == {1}
    assert np.mean(np.array(targets) == 2) == pytest.approx(0.75, abs=0.01)


def test_a_tasks_own_noise_and_temperature_are_used(cache: Path) -> None:
    tasks = {
        "denoising": TaskData(denoising=Denoising(span_ratio=0.5, marker="sentinels", word_drop=0.0)),
        "masked_lm": TaskData(masking=Masking(ratio=0.5, replace=(0.0, 0.0, 1.0)), temperature=LinearHeating()),
    }
    made = data(cache, tasks=tasks)
    (step,) = steps(made, 1)
    sentinels = torch.tensor(made.tokenizer.sentinel_ids)
    assert torch.isin(step["denoising"].source, sentinels).any()
    assert not (step["denoising"].source == made.tokenizer.mask_id).any()
    labels, source = step["masked_lm"].labels, step["masked_lm"].source
    assert labels is not None
    chosen = labels != IGNORE
    assert torch.equal(labels[chosen], source[chosen])
    text = step["masked_lm"].num_tokens - 2 * len(step["masked_lm"])
    assert int(chosen.sum()) / text == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"translaton": TaskData()}}, r"data\.tasks .*got 'translaton'. Did you mean 'translation'"),
        ({"tasks": {}}, r"data\.tasks must name at least one task of translation, "),
        ({"tasks": {"denoising": TaskData(share=0.0)}}, r"data\.tasks\.denoising\.share must be positive: got 0\.0"),
        ({"tasks": {"denoising": TaskData(streams=("dd",))}}, r"tasks\.denoising\.streams .*got 'dd'.*aa, bb, cc"),
        ({"tasks": {"translation": TaskData(streams=("aa-dd",))}}, r"tasks\.translation\.streams .*got 'aa-dd'"),
        ({"max_length": 2}, r"data\.max_length must leave room for text beside 2 special tokens: got 2"),
        ({"tokens_per_step": 0}, r"data\.tokens_per_step must be at least 1: got 0"),
        ({"too_long": "ignore"}, r"data\.too_long must be one of drop, truncate, error: got 'ignore'"),
    ],
)
def test_impossible_settings_name_their_key(change: dict[str, Any], message: str, cache: Path) -> None:
    with pytest.raises(UserError, match=message):
        data(cache, **change)


def test_long_sentences_can_be_an_error(cache: Path) -> None:
    message = (
        r"data\.max_length must hold every sentence.*got 20, and of the 400 of train/aa-bb \d+ are longer: the first "
        r"is number \d+, of \d+ pieces.*set data\.too_long to drop or truncate"
    )
    with pytest.raises(UserError, match=message):
        data(cache, max_length=20, too_long="error").summary()
    made, dropping = data(cache, max_length=500, too_long="error"), data(cache, max_length=500)
    assert made.summary() == dropping.summary()
    assert list(data(cache, max_length=20, too_long="error").val_dataloader()), "evaluation truncates"


@pytest.mark.parametrize("tasks", [["translation"], ["denoising"]])
def test_when_nothing_is_left_the_setting_is_named(tasks: list[str], tmp_path: Path) -> None:
    class Texts(TinySource):
        texts = ("one two three four five six", "seven eight nine ten one two")

        def parallel(self, direction: Direction, split: str) -> list[tuple[str, str]]:
            return [(text, text) for text in self.texts] if split == "train" else []

        def monolingual(self, language: str, split: str) -> list[str]:
            return list(self.texts) if split == "train" else []

    chosen = {name: TaskData() for name in tasks}
    options: dict[str, Any] = {"tasks": chosen, "cache": tmp_path, "vocab_size": 312, "progress": False}
    made = MultitaskData(Texts(), max_length=4, **options)
    least = 2 + min(len(made.tokenizer.encode(text)) for text in Texts.texts)
    message = (
        rf"the task {tasks[0]} needs .* at most data\.max_length pieces.*got 4, and of the \d+ sentences of aa.* the "
        rf"shortest has {least}\. Raise data\.max_length, or set data\.too_long to truncate"
    )
    with pytest.raises(UserError, match=message):
        made.train_dataloader()
    assert len(MultitaskData(Texts(), max_length=4, too_long="truncate", **options).train_dataloader())
    Texts.texts = ()
    with pytest.raises(
        UserError, match=rf"the task {tasks[0]} needs training text: the source tiny has none for it in aa"
    ):
        MultitaskData(Texts(seed=1), tokenizer=made.tokenizer, **options).train_dataloader()


def test_a_vocabulary_too_large_reaches_the_user_as_such(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.vocab_size must be at most"):
        data(tmp_path, vocab_size=100_000).prepare_data()


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "moekit"
    assert MultitaskData(TinySource()).cache == default_cache()


def test_tokenizer_options_reach_the_trainer(tmp_path: Path) -> None:
    made = MultitaskData(
        TinySource(), cache=tmp_path, vocab_size=250, tokenizer_options=TokenizerOptions(byte_fallback=False)
    )
    assert made.tokenizer.vocab_size == 250


class Model(L.LightningModule):
    def configure_optimizers(self) -> None:
        pass


def test_lightning_cli_builds_it_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "seed_everything": False,
        "trainer": {"accelerator": "cpu", "logger": False},
        "data": {
            "source": {"class_path": "tiny_corpus.TinySource", "init_args": {"scale": 0.5}},
            "tasks": {"translation": {"share": 2.0}, "denoising": {"denoising": {"word_drop": 0.2}}},
            "temperature": {"class_path": "moekit.data.mixture.LinearHeating", "init_args": {"end": 3.0}},
            "tokenizer_options": {"model": "bpe"},
            "cache": str(tmp_path / "cache"),
            "vocab_size": 400,
        },
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--data.tokens_per_step", "1000"]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    cli = LightningCLI(Model, MultitaskData, run=False, save_config_callback=None)
    made = cli.datamodule
    assert isinstance(made.source, TinySource)
    assert made.tasks == {"translation": TaskData(share=2.0), "denoising": TaskData(denoising=Denoising(word_drop=0.2))}
    assert made.temperature == LinearHeating(end=3.0)
    assert (made.tokens_per_step, made.tokenizer_options.model) == (1000, "bpe")
    assert set(steps(made, 1)[0]) == {"translation", "denoising"}


def calls(loader: Iterator[Any]) -> int:
    """Calls by the next step, the median of some."""
    return int(np.median([calls_of(lambda: next(loader)) for _ in range(16)]))


def test_a_step_loops_over_no_sentences(cache: Path) -> None:
    """Eight times the tokens are put together by as many calls: what is done for each sentence is done in arrays."""
    source = TinySource(scale=5)
    few, many = (
        calls(iter(data(cache, source=source, tokens_per_step=tokens).train_dataloader())) for tokens in (3200, 25_600)
    )
    assert many < 1.2 * few, (few, many)
