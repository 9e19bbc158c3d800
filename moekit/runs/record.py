"""The records of a run: what a test writes into its folder, and report, surgery and comparison read."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit.atomic import replacing
from moekit.runs.stored_record import VERSION, Record
from moekit.tasks import TranslationTask

TRANSLATIONS = "translations.json.gz"
"""Everything that a model wrote in the test, by task and direction: for each sentence a `Written`."""
STOPPED = "stopped.json"
"""Why training stopped by itself, and at which step; of a run that did not, there is none."""
Written = tuple[int, str, str]
"""Number of the test sentence, reference, and what the model wrote."""


@dataclass(frozen=True, kw_only=True)
class DataRecord(Record):
    """The text of a run.

    Attributes:
        source: kinds of data, joined by commas.
        languages: codes, in the order of their ids.
        directions: translation directions; none where the run does not translate.
        sentences: on which each task trained.
        vocab_size: pieces of the vocabulary.
    """

    source: str = ""
    languages: Sequence[str] = ()
    directions: Sequence[str] = ()
    sentences: Mapping[str, float] = field(default_factory=dict)
    vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class HeldOutRecord(Record):
    """The text that a run was evaluated on.

    Attributes:
        valid: numbers of validation sentences by task.
        test: numbers of test sentences by task, of the tasks that the test measures.
        repeated: numbers of sentences that are training sentences too, and of all, by split and language. Languages
            without any are left out; None where nobody looked.
        remarks: what one should know before one reads the scores, in sentences.
    """

    valid: Mapping[str, int] = field(default_factory=dict)
    test: Mapping[str, int] = field(default_factory=dict)
    repeated: Mapping[str, Any] | None = None
    remarks: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class FloorRecord(Record):
    """What a model as good as can be would lose on held-out text, nats per prediction, where that is known.

    Attributes:
        task: name of the task.
        split: "valid" or "test".
        knowing: loss of a model that knows every fact that the training text tells.
        guessing: loss of one that knows grammar and frequencies, and no fact.
    """

    task: str
    split: str
    knowing: float
    guessing: float


@dataclass(frozen=True, kw_only=True)
class RecallOf(Record):
    """How many questions of one kind were answered right.

    Attributes:
        kind: "known", "composed", "unknowable", "verb", ..., see `moekit.source.ChoiceQuestion`.
        recall: share of the questions, 0 to 1.
        questions: their number.
        deciles: the share by frequency, of the tenth of the facts or nouns that are told most often first; None where
            no question is, as of agreement.
        languages: the share by language.
    """

    kind: str
    recall: float
    questions: int
    deciles: Sequence[float | None] = ()
    languages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecallRecord(Record):
    """Multiple choice about facts, words or agreement, asked of one task.

    Attributes:
        task: whose scores of sentences were compared.
        choices: sentences of a question.
        chance: the share that a blind choice has right.
        kinds: the shares by kind of question.
        about: "facts", "words" or "agreement".
    """

    task: str
    choices: int
    chance: float
    kinds: Sequence[RecallOf] = ()
    about: str = "facts"


@dataclass(frozen=True, kw_only=True)
class DomainRecord(Record):
    """The loss of a task on test text of another domain, nats per prediction.

    Attributes:
        name: name of the domain.
        task: name of the task.
        sentences: number of sentences.
        loss: the loss.
        above_test: how far it is above that on the run's own test text; None where the test measures no loss. Between
            two runs the difference of these numbers is that of their advantages, at home and there.
        knowing, guessing: the floors, as of `FloorRecord`; None where nobody knows.
    """

    name: str
    task: str
    sentences: int
    loss: float
    above_test: float | None = None
    knowing: float | None = None
    guessing: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ending(Record):
    """Where training ended.

    Attributes:
        by: "steps" or "minutes" at its end; else "clock": max_minutes ended it before max_steps; "interrupted": a
            signal did, as Ctrl-C or a time limit of the cluster; "stopped": another cause, as an error or a callback.
        signal: name of the signal that interrupted it.
        steps: optimizer steps that were taken.
        minutes: the time of training in minutes, validation in between included.
        max_steps: where the schedule ends; None = at max_minutes.
        max_minutes: the limit of time; None = none.
        done: share of the schedule that was done, 0 to 1.
        learning_rate: the last learning rate, as a share of the peak.
        rising: whether it ended in the warm-up.
        last_learning_rate: the one that the schedule was to end with, as a share of the peak.
    """

    by: str
    signal: str | None = None
    steps: int
    minutes: float = 0.0
    max_steps: int | None = None
    max_minutes: float | None = None
    done: float = 1.0
    learning_rate: float | None = None
    rising: bool = False
    last_learning_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Summary(Record):
    """What a run came to: summary.json.

    Attributes:
        recipe: its name.
        variant: the recipe's variant.
        smoke: true for a smoke test, whose numbers are no results; else not written.
        data: the text.
        steps: optimizer steps that were taken.
        evaluated_step: the step of the checkpoint that was tested.
        tokens: real tokens that were trained on.
        wall_seconds: seconds of training, validation in between included.
        evaluation_seconds: seconds of the test.
        tokens_per_second: rate of training alone.
        peak_memory: bytes at the fullest, where they lay and what was forecast; None where it was not measured.
        speed: step time, operations a second, their share of the machine's rate and their forecast; see
            `moekit.runs.speed.speed_of`.
        parameters: numbers of the network's: total, and active for a token.
        bleu: average, directions and signature; None where the run does not translate.
        chrf: the same.
        scores: the same of other written answers, by name.
        perplexity: validation perplexity by task.
        loss: validation loss by task, nats per prediction.
        accuracy: validation accuracy by task.
        majority: validation accuracy by task of always giving the most frequent answer.
        chance: accuracy by task of answers drawn evenly from all possible ones.
        copied: what written answers would have scored that copy the source: average and directions by score.
        test: loss, perplexity, accuracy, its majority and chance, and languages by task, of those that do not
            translate.
        routing: means over sparse layers, and each layer by name; None of a dense model.
        tasks: what reports say of each task: see `moekit.tasks.Task.record`.
        held_out: the text of the evaluation.
        ending: where training ended, and why; None where nothing was trained, or nobody wrote it down.
        floors: what the best of models would lose on the held-out text; None where nobody knows.
        recall: facts, words and agreement that are known, by task; None where none were asked for.
        domains: losses on other text; None where none was asked for.
    """

    recipe: str | None = None
    variant: str | None = None
    smoke: bool | None = field(default=None, metadata={"optional": True})
    data: DataRecord = field(default_factory=DataRecord)
    steps: int | None = None
    evaluated_step: int | None = None
    tokens: int | None = None
    wall_seconds: float | None = None
    evaluation_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    bleu: Mapping[str, Any] | None = None
    chrf: Mapping[str, Any] | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)
    perplexity: Mapping[str, float] = field(default_factory=dict)
    loss: Mapping[str, float] = field(default_factory=dict)
    accuracy: Mapping[str, float] = field(default_factory=dict)
    majority: Mapping[str, float] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    copied: Mapping[str, Any] = field(default_factory=dict)
    test: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    routing: Mapping[str, Any] | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    held_out: HeldOutRecord = field(default_factory=HeldOutRecord)
    ending: Ending | None = None
    floors: Sequence[FloorRecord] | None = field(default=None, metadata={"optional": True})
    recall: Sequence[RecallRecord] | None = field(default=None, metadata={"optional": True})
    domains: Sequence[DomainRecord] | None = field(default=None, metadata={"optional": True})


@dataclass(frozen=True, kw_only=True)
class TypicalPiece(Record):
    """A piece of the vocabulary that an expert gets more often than its frequency explains.

    Attributes:
        piece: its text as the tokenizer writes it; U+2581 stands where a word begins.
        count: its assignments to the expert.
        lift: how many times as many they are as of independent pieces and experts; see
            `moekit.training.metrics.PieceCounts`.
    """

    piece: str
    count: int
    lift: float


@dataclass(frozen=True, kw_only=True)
class ExpertRecord(Record):
    """What an expert likes.

    Attributes:
        expert: its number, from 0.
        pieces: its most typical pieces, the most typical first.
    """

    expert: int
    pieces: Sequence[TypicalPiece] = ()


@dataclass(frozen=True, kw_only=True)
class LayerRecord(Record):
    """The routing of one sparse layer in validation.

    Attributes:
        name: its name in the model's `routed_layers`, for example ``encoder.1``.
        num_experts: E.
        assignments: their number.
        load: Float[E], share of the assignments that each expert got; all 0 where nothing was routed.
        load_by_language: the same by language.
        fixed_load: whether the router learns nothing.
        experts_per_token: where it varies, its mean.
        entropy: mean of the router's distribution, nats; None where it has none.
        load_entropy: entropy of the load, 1 = even.
        drop_rate: share of assignments that found no room.
        dead_experts: experts that got next to nothing.
        load_cv: standard deviation of the load over its mean.
        load_max_ratio: largest load over an even share.
        typical: the most typical pieces of experts, of those that have some; None where nobody counted them, as former
            versions did not.
    """

    name: str
    num_experts: int
    assignments: int | None = None
    load: Sequence[float]
    load_by_language: Mapping[str, Sequence[float]] = field(default_factory=dict)
    fixed_load: bool = False
    experts_per_token: float | None = field(default=None, metadata={"optional": True})
    entropy: float | None = None
    load_entropy: float | None = None
    drop_rate: float | None = None
    dead_experts: int | None = None
    load_cv: float | None = None
    load_max_ratio: float | None = None
    typical: Sequence[ExpertRecord] | None = field(default=None, metadata={"optional": True})


@dataclass(frozen=True, kw_only=True)
class RoutingRecord(Record):
    """The routing of a run in validation: routing.json.

    Attributes:
        languages: codes, in the order of their ids.
        layers: the sparse layers.
    """

    languages: Sequence[str] = ()
    layers: Sequence[LayerRecord]


@dataclass(frozen=True, kw_only=True)
class Sample(Record):
    """Something that the model wrote in the test; samples.json is a list of them.

    Attributes:
        task: for which it was written; records of former versions, which had no other, leave translation out.
        direction: translation direction, or the language.
        source: what was given.
        reference: what is right.
        hypothesis: what the model wrote.
        source_gloss, reference_gloss, hypothesis_gloss: English for them, word by word; None where nobody knows it.
    """

    task: str = TranslationTask.name
    direction: str = ""
    source: str = ""
    reference: str = ""
    hypothesis: str
    source_gloss: str | None = field(default=None, metadata={"optional": True})
    reference_gloss: str | None = field(default=None, metadata={"optional": True})
    hypothesis_gloss: str | None = field(default=None, metadata={"optional": True})


def write_written(path: Path, written: Mapping[str, Mapping[str, Sequence[Written]]]) -> None:
    """Keep what was written, by task and direction; the same bytes for the same text."""
    content = json.dumps({"version": VERSION, "tasks": written}, ensure_ascii=False, separators=(",", ":"))
    with replacing(path) as file:
        file.write(gzip.compress(content.encode(), mtime=0))


def read_written(path: Path) -> dict[str, dict[str, list[Written]]]:
    """What was written, by task and direction; {} where the file is missing or broken."""
    try:
        tasks = json.loads(gzip.decompress(path.read_bytes()))["tasks"]
        return {
            task: {direction: [(int(n), str(r), str(h)) for n, r, h in rows] for direction, rows in found.items()}
            for task, found in tasks.items()
        }
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError):
        return {}
