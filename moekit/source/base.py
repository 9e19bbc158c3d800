"""What a source of text is: pairs of sentences by direction and split, and what it knows of them.

Every kind of corpus (generated, files on disk, catalogs of the system) stands behind `Source`; what comes after it
(tokenizer, stores, mixtures, batches) never learns which one it reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, overload

from moekit.errors import UserError, nearest
from moekit.source.direction import Direction
from moekit.source.question import ChoiceQuestion

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Information:
    """-ln of the probability of sentences, in nats: what they cost a model that is as good as can be.

    Attributes:
        knowing: to one that knows all facts that training told.
        guessing: to one that knows grammar and frequencies, and not which value belongs to which entity.
    """

    knowing: Sequence[float]
    guessing: Sequence[float]


class Source(ABC):
    """A corpus: pairs of sentences by direction and split, and sentences by language.

    A subclass sets the three attributes and writes `parallel` and `fingerprint`; `monolingual` follows from them. With
    `register_source` it is a kind of source of its own: `open_source` and the settings of a run then know it by its
    `name`, and take the arguments of its class.

    Attributes:
        name: the kind, as `open_source` knows it.
        languages: codes, in an order that does not change from run to run.
        directions: everything that `parallel` serves, both ways where both are asked for.
        knows_words: whether `word_by_word` says something, which needs none of the text.
        knows_facts: whether there are `questions`, and `information` about the text of a language.
        knows_meanings: whether there are `word_questions`: it knows what its pairs of sentences say.
        knows_agreement: whether there are `agreement_questions`: it knows the grammar of its languages.
    """

    name: str
    languages: tuple[str, ...]
    directions: tuple[Direction, ...]
    knows_words: ClassVar[bool] = False
    knows_facts: ClassVar[bool] = False
    knows_meanings: ClassVar[bool] = False
    knows_agreement: ClassVar[bool] = False

    @abstractmethod
    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Pairs (source, target) of one direction; empty where the corpus has none in this split.

        Raises:
            UserError: if the source does not serve `direction`, or `split` is none of train, valid, test.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of content and settings: equal digests promise equal answers of every method."""

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Sentences of one language: by default its side of the parallel data, each once, in order of appearance."""
        self.check_language(language)
        self.check_split(split)
        seen: dict[str, None] = {}
        for direction in self.directions:
            if direction.source == language:
                seen.update(dict.fromkeys(pair[0] for pair in self.parallel(direction, split)))
            elif direction.target == language and direction.reverse not in self.directions:
                seen.update(dict.fromkeys(pair[1] for pair in self.parallel(direction, split)))
        return list(seen)

    def prepare(self, cache: Path, *, progress: bool = True) -> None:  # noqa: B027 (most sources need nothing)
        """Do what is done once for all processes that read the text; several may ask at once.

        Args:
            cache: a folder that stays.
            progress: show a bar, if on a terminal.
        """

    def word_by_word(self, language: str, text: str) -> str | None:
        """English for a text in a language, word by word, where the source knows it; else None."""
        return None

    def questions(self, language: str, *, each: int, choices: int) -> list[ChoiceQuestion]:
        """Questions about facts in a language, of sentences that are in no text; none where nothing is known of it.

        Args:
            language: one of the source's.
            each: at most so many of each decile of each kind; of unknowable facts ten times as many.
            choices: values to choose from.
        """
        return []

    def word_questions(self, direction: Direction, *, each: int, choices: int) -> list[ChoiceQuestion]:
        """Questions about the words of a direction, of sentences that are in no text; none where it knows no meanings.

        Args:
            direction: one of the source's.
            each: at most so many of each decile of the nouns; of nouns that are never said ten times as many.
            choices: nouns to choose from.
        """
        return []

    def agreement_questions(self, language: str, *, each: int) -> list[ChoiceQuestion]:
        """Questions about agreement in a language, two sentences each; none where its grammar has or shows none.

        Args:
            language: one of the source's.
            each: at most so many of each kind, rounded up to an even number.
        """
        return []

    def information(self, language: str, split: Split) -> Information | None:
        """What each held-out sentence of a language costs, in the order of `monolingual`; None where nobody knows.

        Its language is not given: that is told by the first word.
        """
        return None

    def salient(self, language: str) -> frozenset[str] | None:
        """Words of a language that carry knowledge, as its text writes them; None where the source knows of none."""
        return None

    @classmethod
    def parameters(cls) -> Mapping[str, Parameter]:
        """What `open` takes, by name: the arguments of the class. `path` is among them unless the text is generated."""
        return signature(cls).parameters

    @classmethod
    def needs_path(cls) -> bool:
        """Whether `open` must be told where the corpus lies."""
        path = cls.parameters().get("path")
        return path is not None and path.default is Parameter.empty

    @classmethod
    def open(cls, path: str | Path | None = None, **settings: Any) -> Source:
        """A corpus of this kind.

        Args:
            path: where it lies; None where the kind needs none.
            settings: others of `parameters`.

        Raises:
            UserError: a path for generated text, or none where one is needed; an unknown setting, with the nearest
                name; whatever is wrong with the data.
        """
        known = cls.parameters()
        if path is None and cls.needs_path():
            raise UserError(f"{cls.name}: a path is required: got none. Say where the corpus lies.")
        if path is not None and "path" not in known:
            raise UserError(f"{cls.name}: the corpus is generated and has no path: got {path}. Leave the path out.")
        for name in settings:
            if name not in known:
                others = [other for other in known if other != "path"]
                raise UserError(f"{cls.name}: settings must be known ones: got {name!r}. {nearest(name, others)}")
        return cls.from_parameters(**settings if path is None else {"path": path, **settings})

    @classmethod
    def from_parameters(cls, **given: Any) -> Source:
        """A corpus from `parameters`, for `open`: for most kinds the class called with them."""
        return cls(**given)

    @classmethod
    def settings_from(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a run's data settings that this kind takes: by default those named as `parameters` are.

        Args:
            given: plain values by the names of the settings, `directions` a tuple or None.
        """
        return {name: given[name] for name in cls.parameters() if name in given and name != "path"}

    def check_language(self, language: str) -> None:
        """Raise UserError, with the nearest name, if the source does not hold `language`."""
        if language not in self.languages:
            raise UserError(
                f"{self.name}: the language must be one of the data: got {language!r}. "
                f"{nearest(language, self.languages)}"
            )

    def check_direction(self, direction: Direction) -> None:
        """Raise UserError, with the nearest name, if the source does not serve `direction`."""
        if direction not in self.directions:
            self.check_language(direction.source)
            self.check_language(direction.target)
            raise UserError(
                f"{self.name}: the direction must be one that the source serves: got {direction}. "
                f"{nearest(str(direction), map(str, self.directions))}"
            )

    def check_split(self, split: Split) -> Split:
        """Raise UserError if `split` is none of train, valid, test; else return it."""
        if split not in SPLITS:
            raise UserError(f"{self.name}: the split must be one of {', '.join(SPLITS)}: got {split!r}.")
        return split

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(languages={', '.join(self.languages)}; {len(self.directions)} direction"
            f"{'' if len(self.directions) == 1 else 's'})"
        )


class LazySequence(Sequence[_T]):
    """A sequence whose items are made when asked for.

    Args:
        size: how many.
        item: makes the one at an index from 0 to `size` - 1.
    """

    def __init__(self, size: int, item: Callable[[int], _T]) -> None:
        self._size, self._item = size, item

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[_T]:
        return map(self._item, range(self._size))

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> list[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | list[_T]:
        chosen = range(self._size)[index]
        return [self._item(i) for i in chosen] if isinstance(chosen, range) else self._item(chosen)
