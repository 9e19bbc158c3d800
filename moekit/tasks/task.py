"""What a task is: all that is particular to it, from the text it needs to the words that a report says about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from moekit.data.batch import Batch, Sentences
from moekit.data.ragged import Ragged
from moekit.data.tokenizer import Tokenizer
from moekit.source import Source
from moekit.tasks.head import Head

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class SampleWording:
    """How a report presents the samples of a task.

    Attributes:
        title: heading of the section.
        lead: what the samples are, and what the marked words mean.
        source: name of what the model was given.
        reference: name of what would have been right.
        noun: what one sample is.
        unknown: heading of samples that do not say their direction or language.
    """

    title: str = "Samples"
    lead: str = "Held-out texts the model never saw. Marked words stand in the expected text too, in the same order."
    source: str = "Input"
    reference: str = "Expected"
    noun: str = "text"
    unknown: str = "language not recorded"


@dataclass(frozen=True)
class Task(ABC):
    """One training task: which text it needs, how text becomes a batch, which head learns it, and how it is reported.

    A subclass is a frozen dataclass. Its fields are the settings that it reads of a `TaskData`, by the same names. It
    holds no weights: those are its head's, which lies in the same file.

    Attributes:
        name: under which data, heads, metrics and files know the task.
        title: heading in reports.
        explanation: one sentence for reports: what the model does.
        samples: how reports present what the model wrote.
        head: class of its head.
        pairs: whether it needs pairs of texts, by direction; else it needs text of one language.
        perplexity: whether it predicts tokens of the vocabulary, so that exp(loss) is a perplexity.
        writes: what `moekit.inference.completer.Completer` writes for a sample: the continuation of half a text, the
            text that was damaged, or the spans that it lacks; None = nothing.
        recalls: how `moekit.inference.choices.ChoiceScorer` asks for a fact: by the likelihood of the sentence, of the
            missing span, of the sentence given its other words, or of masked words; or for a word: by that of the
            target given its source. None = it has none, or its input would say the answer.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    explanation: ClassVar[str]
    samples: ClassVar[SampleWording] = SampleWording()
    head: ClassVar[type[Head]]
    pairs: ClassVar[bool] = False
    perplexity: ClassVar[bool] = True
    writes: ClassVar[Literal["continuation", "text", "spans"] | None] = None
    recalls: ClassVar[Literal["sentence", "span", "restored", "masked", "target"] | None] = None

    @classmethod
    def of(cls, settings: Any) -> Self:
        """The task with the settings of a `TaskData`."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @classmethod
    def configured(cls, data: Any) -> dict[str, Any]:
        """Settings of a `TaskData`, by name, that follow from a recipe's data settings.

        Args:
            data: the data settings of a recipe (``DataConfig``).

        Raises:
            ValueError: if they are none for this task.
        """
        return {}

    @classmethod
    def make_head(cls, dim: int, label_smoothing: float) -> Head:
        """A head for a backbone of `dim` channels; by default one that needs to know `label_smoothing` alone."""
        return cls.head(label_smoothing=label_smoothing)  # type: ignore[call-arg]

    @property
    def scored(self) -> bool:
        """Whether testing scores what the model writes; else it measures loss and perplexity."""
        return bool(self.head.scores)

    @property
    def seeks_words(self) -> bool:
        """Whether it looks for the salient words of its source, on which the sizes of its batches then depend."""
        return False

    def check(self, room: int, source: Source) -> None:  # noqa: B027 (most tasks can use any text)
        """Raise UserError if there may be texts of up to `room` tokens, or of this source, that it cannot use."""

    def bound(self, source: Source, tokenizer: Tokenizer) -> Self:
        """The task as it reads text of `source` in pieces of `tokenizer`; itself unless it `seeks_words`."""
        return self

    def require_words(self, texts: Iterable[tuple[Ragged, Lengths]]) -> None:  # noqa: B027 (most seek none)
        """Raise UserError if none of some training texts, with the ids of their languages, has a word that it seeks."""

    def chunk(self, room: int) -> int | None:
        """Tokens of the chunks into which a language's text is cut, so that `room` tokens hold each; None = sentences.

        Args:
            room: most tokens on the source side, specials not counted.
        """
        return None

    def sizes(self, lengths: Lengths) -> Sequence[Lengths]:
        """Tokens on the sides of a batch, source before target, specials not counted.

        Args:
            lengths: Int64[sides, n], tokens of the texts that it gets.
        """
        return [lengths[0]]

    def text_sizes(self, text: Ragged, languages: Lengths) -> Sequence[Lengths]:
        """As `sizes`, of the texts themselves, Int64[n] their languages: for tasks that seek words."""
        return self.sizes(text.lengths[None])

    def asked(self, text: Ragged, languages: Lengths, tokenizer: Tokenizer) -> tuple[Ragged, Ragged] | None:
        """Texts with all words cut out that it seeks, and these words: the form in which it learns facts.

        None where words are not its own choice, or not all of them.
        """
        return None

    @abstractmethod
    def collate(self, rows: Sentences) -> Batch:
        """The batch of some sentences, damaged as the task wants it."""

    @classmethod
    def record(cls) -> dict[str, Any]:
        """What a run's folder keeps, so that a report needs nothing but the folder."""
        return {
            "title": cls.title,
            "explanation": cls.explanation,
            "perplexity": cls.perplexity,
            "samples": asdict(cls.samples),
            "scores": dict(cls.head.scores),
        }
