"""`MultitaskData`: a source, its tokenizer, its tokens on disk, and the batches of several tasks, for a Trainer."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import lightning as L
import numpy as np

from moekit.data.batch import SPECIALS, Batch
from moekit.data.batching import EvaluationBatches, Loader, TrainingSteps
from moekit.data.mixture import Constant, TemperatureSchedule
from moekit.data.plan import StepPlan
from moekit.data.store import SIDES, TokenStore, Wanted, cached_store, monolingual_section, parallel_section
from moekit.data.streams import Rank, TaskStreams, TooLong, open_chunks, open_stream
from moekit.data.tokenizer import Tokenizer, TokenizerOptions, train_tokenizer
from moekit.errors import UserError, nearest
from moekit.source import SPLITS, Direction, Source, Split
from moekit.tasks import TASKS, Task, TaskData, TranslationTask

log = logging.getLogger(__name__)


def default_cache() -> Path:
    """The user's cache folder for moekit."""
    return Path.home() / ".cache" / "moekit"


class MultitaskData(L.LightningDataModule):
    """Batches of several tasks from one source of text.

    Training yields ``dict[str, Batch]`` (task name -> batch) for every step. Validation yields single `Batch` objects
    of all tasks, direction by direction, with noise that never changes; testing yields the tasks whose written answers
    are scored, such as translation, or, where there is none, all tasks as in validation. The order of
    training is a function of the seed and the step: the Trainer's count of batches says where it begins, so a resumed
    run goes on with exactly the next step, for any number of workers. The sentences of a step, over all ranks together,
    and their noise are the same for any number of ranks, as long as a task's budget holds its longest sentence once for
    each rank (beyond that, batches of long sentences grow, so that no rank is left without one).

    Args:
        source: where text comes from.
        tasks: by name (see `moekit.tasks.TASKS`); only translation where not given.
        cache: folder of tokenizers and token stores; None = the user's cache folder.
        vocab_size: of the tokenizer, specials included.
        tokenizer_options: how the tokenizer is trained.
        tokenizer: one that exists already, as in fine-tuning; it must know the source's languages. The two settings
            before are not used then.
        tokens_per_step: padded positions of one training step over all tasks, both sides and all ranks.
        evaluation_tokens: padded positions of an evaluation batch over all ranks; None = tokens_per_step.
        temperature: of the mixture over directions or languages within a task.
        max_length: most positions of a sentence, its two special tokens included.
        too_long: whether longer training sentences are dropped, cut or an error. Evaluation cuts.
        pad_multiple: padded lengths are rounded up to a multiple of this.
        steps_per_epoch: None = as many as show each sentence of the first task once, at the first step's mixture.
        valid_sentences: at most so many of each direction (or language) are used in validation; None = all.
        test_sentences: likewise for testing.
        seed: of all choices and all noise.
        order_seed: of training's order and noise, where it is not `seed`: another order of the same text.
        num_workers: processes that build training batches ahead.
        progress: show a bar while text is encoded, if on a terminal.
    """

    def __init__(
        self,
        source: Source,
        *,
        tasks: Mapping[str, TaskData] | None = None,
        cache: Path | str | None = None,
        vocab_size: int = 8000,
        tokenizer_options: TokenizerOptions | None = None,
        tokenizer: Tokenizer | None = None,
        tokens_per_step: int = 4096,
        evaluation_tokens: int | None = None,
        temperature: TemperatureSchedule | None = None,
        max_length: int = 128,
        too_long: TooLong = "drop",
        pad_multiple: int = 1,
        steps_per_epoch: int | None = None,
        valid_sentences: int | None = None,
        test_sentences: int | None = None,
        seed: int = 0,
        order_seed: int | None = None,
        num_workers: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.source = source
        self.tasks = dict(tasks) if tasks is not None else {TranslationTask.name: TaskData()}
        self.cache = Path(cache) if cache is not None else default_cache()
        self.vocab_size = vocab_size
        self.tokenizer_options = tokenizer_options or TokenizerOptions()
        self.tokens_per_step = tokens_per_step
        self.evaluation_tokens = evaluation_tokens or tokens_per_step
        self.temperature = temperature or Constant()
        self.max_length = max_length
        self.too_long: TooLong = too_long
        self.pad_multiple = pad_multiple
        self.steps_per_epoch = steps_per_epoch
        self.valid_sentences = valid_sentences
        self.test_sentences = test_sentences
        self.seed = seed
        self.order_seed = seed if order_seed is None else order_seed
        self.num_workers = num_workers
        self.progress = progress
        self._check()
        self._tokenizer = tokenizer
        self._store: TokenStore | None = None

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes, in the order of their ids."""
        return self.source.languages

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Directions of the tasks on pairs, such as translation; none where there is no such task."""
        return tuple(map(self._direction, self._all_chosen(pairs=True)))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; trained, or read from the cache, when first asked for."""
        if self._tokenizer is None:
            self.source.prepare(self.cache, progress=self.progress)
            self._tokenizer = train_tokenizer(
                self.source,
                vocab_size=self.vocab_size,
                cache_dir=self.cache,
                seed=self.seed,
                **asdict(self.tokenizer_options),
            )
        return self._tokenizer

    @property
    def store(self) -> TokenStore:
        """The tokens of all splits; encoded, or opened from the cache, when first asked for."""
        if self._store is None:
            tokenizer = self.tokenizer
            self.source.prepare(self.cache, progress=self.progress)
            self._store = cached_store(
                self.source, tokenizer, self.wanted(), cache_dir=self.cache, progress=self.progress
            )
        return self._store

    def prepare_data(self) -> None:
        """Train the tokenizer and encode all text, unless the cache has both."""
        log.info("%s", self.store.folder)

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` built (every process does)."""
        log.debug("%s", self.store.folder)

    def train_dataloader(self) -> Loader[dict[str, Batch]]:
        """One item per training step, from the Trainer's current step on."""
        steps = {name: self._planned(name) for name in self.tasks}
        first, plan = next(iter(steps.values()))
        return Loader(
            TrainingSteps(steps),
            self.steps_per_epoch or max(1, math.ceil(len(first) / plan.rows_per_step)),
            lambda: batches_so_far(self.trainer),
            num_workers=self.num_workers,
            pin_memory=on_cuda(self.trainer),
        )

    def val_dataloader(self) -> Loader[Batch] | list[Any]:
        """Validation batches of all tasks, in order."""
        return self._evaluation(self.tasks, "valid", self.valid_sentences)

    def test_dataloader(self) -> Loader[Batch] | list[Any]:
        """Test batches, in order: of the tasks whose written answers are scored, or of all where there is none."""
        return self._evaluation(self._scored or self.tasks, "test", self.test_sentences)

    def task(self, name: str) -> Task:
        """One of the tasks, with its settings."""
        return TASKS[name].of(self.tasks[name])

    @functools.cached_property
    def readers(self) -> dict[str, Task]:
        """The tasks as they read this text in these pieces, by name."""
        return {name: self.task(name).bound(self.source, self.tokenizer) for name in self.tasks}

    def pairs(self, direction: Direction | str, split: Split) -> Sequence[tuple[str, str]]:
        """The original sentences: `Batch.index` of an evaluation batch says which of them its rows are."""
        return self.source.parallel(self._direction(direction), split)

    def originals(self, split: Split) -> Callable[[str, list[int]], tuple[list[str], list[str]]]:
        """What gives the original sources and references of sentences by direction and number."""

        def found(direction: str, numbers: list[int]) -> tuple[list[str], list[str]]:
            pairs = self.pairs(direction, split)
            return [pairs[i][0] for i in numbers], [pairs[i][1] for i in numbers]

        return found

    def wanted(self, splits: Sequence[Split] = SPLITS) -> Wanted:
        """What of the source is used in these splits."""
        parallel = [(direction, split) for direction in self.directions for split in splits]
        # Text of one language is tested on only where there are no written answers to score.
        used = [split for split in splits if split != "test" or not self._scored]
        mono = [(language, split) for language in self._all_chosen(pairs=False) for split in used]
        return Wanted(tuple(parallel), tuple(mono))

    def evaluated(self, split: Split) -> dict[str, int]:
        """How many sentences of validation or test text each task is measured on: of tests those that take part."""
        limit = self.valid_sentences if split == "valid" else self.test_sentences
        tasks = self.tasks if split == "valid" else self._scored or self.tasks
        return {name: len(self._streams(name, split, limit)) for name in tasks}

    def summary(self) -> dict[str, dict[str, float | int]]:
        """What each task trains on: sentences used, dropped and truncated, sentences per step, share of padding."""
        rows: dict[str, dict[str, float | int]] = {}
        for name in self.tasks:
            task, plan = self._planned(name)
            rows[name] = {
                "streams": len(task.streams),
                "sentences": len(task),
                "dropped": sum(s.dropped for s in task.streams),
                "truncated": sum(s.truncated for s in task.streams),
                "tokens_per_step": plan.budget,
                "sentences_per_step": plan.rows_per_step,
                "padding": plan.padding,
            }
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What the order of training depends on, to be compared when a checkpoint is resumed."""
        return {"settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on training with other data than the checkpoint's.

        Raises:
            UserError: if a setting that decides the order of training differs.
        """
        if self.trainer is None or not self.trainer.training:
            return
        mine, theirs = self._settings(), state_dict.get("settings", {})
        differing = [name for name in mine if name in theirs and mine[name] != theirs[name]]
        if differing:
            listed = "; ".join(f"data.{n}: {theirs[n]} in the checkpoint, {mine[n]} now" for n in differing)
            raise UserError(
                f"A resumed run must have the data settings of its checkpoint: got {listed}. Restore them, or start a "
                "new run."
            )

    def _settings(self) -> dict[str, str]:
        return {
            "source": self.source.fingerprint()[:16],
            "tokenizer": self.tokenizer.fingerprint[:16],
            "tasks": repr(self.tasks),
            "sentinel": repr([name for name, task in self.tasks.items() if task.sentinel]),
            "salient": repr({name: task.span_corruption.salient for name, task in self.tasks.items()}),
            "tokens_per_step": str(self.tokens_per_step),
            "temperature": repr(self.temperature),
            "max_length": str(self.max_length),
            "too_long": self.too_long,
            "pad_multiple": str(self.pad_multiple),
            "seed": str(self.order_seed),
        }

    def _check(self) -> None:
        if not self.tasks:
            raise UserError(f"data.tasks must name at least one task of {', '.join(TASKS)}: got none.")
        for name, task in self.tasks.items():
            if name not in TASKS:
                raise UserError(f"data.tasks must name tasks that exist: got {name!r}. {nearest(name, TASKS)}")
            if not task.share > 0:
                raise UserError(f"data.tasks.{name}.share must be positive: got {task.share}. Leave the task out.")
            known = self._stream_names(name)
            for stream in task.streams or ():
                if stream not in known:
                    raise UserError(
                        f"data.tasks.{name}.streams must be among the source's: got {stream!r}. "
                        f"{nearest(stream, known)}"
                    )
        for key, value in (("tokens_per_step", self.tokens_per_step), ("pad_multiple", self.pad_multiple)):
            if value < 1:
                raise UserError(f"data.{key} must be at least 1: got {value}.")
        if self.max_length <= SPECIALS:
            raise UserError(
                f"data.max_length must leave room for text beside {SPECIALS} special tokens: got {self.max_length}."
            )
        for name in self.tasks:
            self.task(name).check(self.max_length - SPECIALS, self.source)
        if self.too_long not in get_args(TooLong):
            raise UserError(f"data.too_long must be one of {', '.join(get_args(TooLong))}: got {self.too_long!r}.")

    @property
    def _scored(self) -> list[str]:
        return [name for name in self.tasks if self.task(name).scored]

    def _stream_names(self, task: str) -> list[str]:
        return [str(d) for d in self.source.directions] if TASKS[task].pairs else list(self.languages)

    def _chosen(self, task: str) -> list[str]:
        return list(self.tasks[task].streams or self._stream_names(task))

    def _all_chosen(self, *, pairs: bool) -> dict[str, None]:
        return dict.fromkeys(name for task in self.tasks if TASKS[task].pairs == pairs for name in self._chosen(task))

    def _direction(self, name: Direction | str) -> Direction:
        served = {str(known): known for known in self.source.directions}
        return served.get(str(name)) or Direction.parse(name)

    def _sections(self, task: str, stream: str, split: Split) -> list[str]:
        """What of the store a stream is made of."""
        if not TASKS[task].pairs:
            return [monolingual_section(stream, split)]
        return [parallel_section(self._direction(stream), split, side) for side in SIDES]

    def _streams(self, name: str, split: Split, limit: int | None = None) -> TaskStreams:
        task = self.readers[name]
        length = task.chunk(self.max_length - SPECIALS)
        too_long: TooLong = self.too_long if split == "train" else "truncate"
        streams = []
        for stream in self._chosen(name):
            direction = self._direction(stream) if task.pairs else Direction(stream, stream)
            sections = self._sections(name, stream, split)
            ids = (self.tokenizer.language_id(direction.source), self.tokenizer.language_id(direction.target))
            if length is not None:
                found = open_chunks(self.store, stream, sections[0], ids, length=length, limit=limit)
            else:
                most = self.max_length
                found = open_stream(self.store, stream, sections, ids, max_length=most, too_long=too_long, limit=limit)
            streams.append(found)
        return TaskStreams(task, streams, self.store, self.tokenizer, self.pad_multiple, self._rank())

    def _planned(self, name: str) -> tuple[TaskStreams, StepPlan]:
        task, data = self._streams(name, "train"), self.tasks[name]
        if not len(task):
            raise self._nothing_to_train_on(name)
        if task.task.seeks_words:
            self.readers[name].require_words(task.sample())
        total = sum(t.share for t in self.tasks.values())
        plan = StepPlan(
            name,
            task.sizes(),
            budget=int(self.tokens_per_step * data.share / total),
            temperature=data.temperature or self.temperature,
            shares=data.stream_shares,
            seed=self.order_seed,
            least_rows=task.rank.count,
        )
        return task, plan

    def _nothing_to_train_on(self, name: str) -> UserError:
        chosen = self._chosen(name)
        shown = ", ".join(chosen[:6]) + (" and others" if len(chosen) > 6 else "")
        sides = [[self.store.lengths(section) for section in self._sections(name, x, "train")] for x in chosen]
        filled = [lengths for lengths in (np.stack(side) for side in sides) if lengths.shape[1]]
        if not filled:
            return UserError(
                f"the task {name} needs training text: the source {self.source.name} has none for it in {shown}. Give "
                f"some, or leave the task out (tasks.{name}.tokens 0)."
            )
        # Of pairs the longer side counts; one with an empty side cannot be used, however short the other is.
        longest = np.concatenate([np.where(x.min(axis=0) > 0, x.max(axis=0), 0) for x in filled])
        used = longest[longest > 0]
        found = f"the shortest has {used.min() + SPECIALS:,}" if len(used) else "all are empty"
        return UserError(
            f"the task {name} needs training sentences of at most data.max_length pieces, special tokens included: got "
            f"{self.max_length}, and of the {len(longest):,} sentences of {shown} {found}. "
            + ("Raise data.max_length, or set data.too_long to truncate." if len(used) else "Give text.")
        )

    def _evaluation(self, tasks: Iterable[str], split: Split, limit: int | None) -> Loader[Batch] | list[Any]:
        streams = (self._streams(name, split, limit) for name in tasks)
        batches = EvaluationBatches(streams, budget=self.evaluation_tokens, seed=self.seed)
        return Loader(batches, len(batches), pin_memory=on_cuda(self.trainer)) if len(batches) else []

    def _rank(self) -> Rank:
        # The strategy knows which processes share a batch's sentences: with tensor parallelism not all of them do.
        sharing = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return Rank(sharing["rank"], sharing["num_replicas"]) if sharing else Rank()


def batches_so_far(trainer: L.Trainer | None) -> int:
    """Batches that were trained on, those before a resume included."""
    # `processed`, because a batch whose training was cut off must be done again, and because `completed` has not
    # been counted yet when a checkpoint is written in on_train_batch_end.
    if trainer is None:
        return 0
    return int(getattr(trainer.fit_loop.epoch_loop.batch_progress.total, "processed"))  # noqa: B009


def on_cuda(trainer: L.Trainer | None) -> bool:
    """Whether batches go to a GPU, so that pinned memory pays."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"
