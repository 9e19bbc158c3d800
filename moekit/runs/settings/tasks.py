"""Which tasks a run trains, how much of each, and how the result is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moekit.errors import UserError, nearest
from moekit.runs.settings.data import DOMAIN_SETTINGS
from moekit.runs.settings.fields import RESUME, setting
from moekit.tasks import with_pair_tasks
from moekit.tasks.bleu import BleuTokenizer, bleu


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One training task of a multitask run.

    Attributes:
        weight: weight of the loss of this task in the total loss; 1 is usual.
        tokens: number of tokens of this task in each batch, per device; 0 = the task is not trained.
    """

    weight: float = setting(1.0, at_least=0)
    tokens: int = setting(0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class LanguageModelTasks:
    """The task of a language model.

    Attributes:
        causal_lm: language modelling: predict the next token.
    """

    causal_lm: TaskConfig = field(default_factory=lambda: TaskConfig(tokens=2048))


@with_pair_tasks(TaskConfig)
@dataclass(frozen=True, kw_only=True)
class SpanCorruptionTasks:
    """The task of a T5-like model.

    Attributes:
        span_corruption: span corruption: restore the spans that were cut out of a text (T5).
    """

    span_corruption: TaskConfig = field(default_factory=lambda: TaskConfig(tokens=2048))


@with_pair_tasks(TaskConfig)
@dataclass(frozen=True, kw_only=True)
class TranslationTasks:
    """The task of a translation model.

    Attributes:
        translation: translation: learn from parallel text.
    """

    translation: TaskConfig = field(default_factory=lambda: TaskConfig(tokens=2048))


def active_tasks(tasks: Any) -> dict[str, TaskConfig]:
    """The tasks that take part, from a dataclass whose fields are the tasks."""
    named = {f.name: getattr(tasks, f.name) for f in fields(tasks)}
    return {name: task for name, task in named.items() if task.tokens > 0}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the trained model is evaluated.

    Attributes:
        beam_size: number of hypotheses that beam search keeps; 1 = greedy search, 4 is usual in translation.
        length_penalty: exponent alpha of the length penalty ((5 + length) / 6) ** alpha; larger values favour longer
            output, 0.6 is usual.
        max_sentences: maximum number of test sentences per direction that are translated; 0 = all.
        valid_sentences: maximum number of validation sentences per direction or language; 0 = all. 100 keeps validation
            fast.
        score_valid: number of validation sentences per direction, at most valid_sentences, that are translated and
            scored (valid/bleu/..., valid/chrf/...) in validations during training; 0 = none, 50 shows how BLEU grows.
        score_valid_every: number of validations from one with such scores to the next; 1 = in each.
        score_valid_beam: number of hypotheses that beam search keeps in these; 1 = greedy search, which is fastest.
        batch_tokens: number of source tokens, or of tokens of prompts, in an evaluation batch; lower it if memory
            runs out.
        samples: number of sample translations per direction that the report shows.
        facts: for the facts corpus: number of questions of each decile of frequency, kind and language that the test
            asks to measure recall; 0 = it asks none.
        words: for translation of babel: number of questions of each decile of frequency and direction that the test
            asks to measure recall of words, and ten times as many about nouns that no text has; 0 = it asks none.
        agreement: for languages of babel and facts: number of questions of each language and kind of agreement that the
            test asks, each of a held-out sentence and the same with one word in a wrong form; an odd number counts as
            the next even one; 0 = it asks none.
        choices: number of values, or nouns, that a question gives to choose from; chance is 1 / choices.
        domains: test text of other domains on which the loss is measured too, by a name of your choice: settings of the
            group data over those of the run, as {talks: {source: text, path: my/talks}}. Text is cut into the run's
            pieces, so its languages must be among the run's.
        bleu_tokenizer: how BLEU splits text into words, as sacrebleu names it: auto = by the target language (zh for
            Chinese, ja-mecab and ko-mecab where installed, char for Thai, Lao, Khmer, Burmese and Tibetan, else 13a),
            or 13a, intl, char, zh, ja-mecab, ko-mecab, flores200 or spm for all directions.
    """

    beam_size: int = setting(4, at_least=1, free=RESUME)
    length_penalty: float = setting(0.6, at_least=0, free=RESUME)
    max_sentences: int = setting(0, at_least=0)
    valid_sentences: int = setting(100, at_least=0)
    score_valid: int = setting(0, at_least=0)
    score_valid_every: int = setting(1, at_least=1)
    score_valid_beam: int = setting(1, at_least=1)
    batch_tokens: int = setting(4096, at_least=1)
    samples: int = setting(5, at_least=0, free=RESUME)
    facts: int = setting(50, at_least=0, free=RESUME)
    words: int = setting(0, at_least=0, free=RESUME)
    agreement: int = setting(0, at_least=0, free=RESUME)
    choices: int = setting(8, at_least=2, free=RESUME)
    domains: dict[str, dict[str, Any]] | None = setting(None, free=RESUME)
    bleu_tokenizer: BleuTokenizer = setting("auto", free=RESUME)

    def check(self) -> None:
        """Make sure that a tokenizer that was chosen is there, and that domains are given by settings of data.

        Raises:
            UserError: it is not, or they are not.
        """
        if self.domains:
            _check_domains(self.domains)
        if self.bleu_tokenizer != "auto":
            bleu(self.bleu_tokenizer)


def _check_domains(domains: Mapping[str, Mapping[str, Any]]) -> None:
    """Make sure that domains are given by settings of data that say which text is read."""
    for name, given in domains.items():
        if not name or not isinstance(given, Mapping):
            raise UserError(
                "evaluate.domains must be settings of data by name, as {talks: {source: text, path: my/talks}}: "
                f"got {name!r}: {given!r:.60}."
            )
        for key in given:
            if key not in DOMAIN_SETTINGS:
                raise UserError(
                    f"evaluate.domains.{name}.{key} must be a setting of data that says which text is read. "
                    f"{nearest(key, DOMAIN_SETTINGS)}"
                )
