"""What a source of text is: languages, directions, and pairs of sentences by split.

Every kind of corpus (generated, files on disk, catalogs of the system) stands behind `Source`; what comes after it
(tokenizer, stores, mixtures, batches) never learns which one it reads.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, overload

from moekit.errors import UserError, nearest

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_T = TypeVar("_T")

_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_@.]*")


def language_code(text: str, where: str = "") -> str:
    """`text` as a language code: letters, digits, ``_ @ .``; a hyphen (``pt-BR``) becomes an underscore.

    Hyphens are taken: they part the two languages of a direction.

    Raises:
        UserError: if `text` is no such code; `where` (a file, a line) begins the message.
    """
    code = text.strip().replace("-", "_")
    if not _CODE.fullmatch(code):
        place = f"{where}: " if where else ""
        raise UserError(
            f"{place}a language code must begin with a letter and hold letters, digits, '_', '@' or '.': got {text!r}. "
            "Rename it."
        )
    return code


@dataclass(frozen=True, order=True)
class Direction:
    """From one language into another; written ``en-de``."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"

    @classmethod
    def parse(cls, text: str | Direction) -> Direction:
        """Read ``"en-de"``; a `Direction` passes through.

        Raises:
            UserError: if `text` does not name two different languages parted by one hyphen.
        """
        if isinstance(text, Direction):
            return text
        source, hyphen, target = text.partition("-")
        if not hyphen or "-" in target or not source or not target or source == target:
            raise UserError(
                f"a direction must be two different language codes with one hyphen between, as en-de: got {text!r}. "
                "Write the code pt-BR as pt_BR."
            )
        return cls(language_code(source), language_code(target))

    @property
    def reverse(self) -> Direction:
        """The other way round."""
        return Direction(self.target, self.source)


def all_directions(languages: Sequence[str]) -> tuple[Direction, ...]:
    """Every ordered pair of different languages."""
    return tuple(Direction(a, b) for a, b in permutations(languages, 2))


def choose_directions(
    available: Sequence[Direction],
    *,
    pivot: str | None = None,
    wanted: Sequence[str | Direction] | None = None,
) -> tuple[Direction, ...]:
    """The directions a source shall serve, out of those it could.

    Args:
        available: what the data allow.
        pivot: keep only directions that begin or end in this language.
        wanted: keep only these, in this order.

    Raises:
        UserError: if a name is unknown or nothing is left.
    """
    chosen = tuple(available)
    if pivot is not None:
        languages = {code for direction in available for code in (direction.source, direction.target)}
        if pivot not in languages:
            raise UserError(f"pivot must be a language of the data: got {pivot!r}. {nearest(pivot, languages)}")
        chosen = tuple(d for d in chosen if pivot in (d.source, d.target))
    if wanted is not None:
        if isinstance(wanted, str):
            raise UserError(f"directions must be a list: got the text {wanted!r}. Write [{wanted}].")
        parsed = tuple(dict.fromkeys(Direction.parse(text) for text in wanted))
        for direction in parsed:
            if direction not in chosen:
                raise UserError(
                    f"directions must be among those of the data: got {direction}. "
                    f"{nearest(str(direction), map(str, chosen))}"
                )
        chosen = parsed
    if not chosen:
        raise UserError("at least one direction is required: got none. Name some in `directions`, or leave it out.")
    return chosen


def languages_of(directions: Sequence[Direction], known: Iterable[str]) -> tuple[str, ...]:
    """Those of the `known` languages that `directions` begin or end in, each once."""
    spoken = {code for direction in directions for code in (direction.source, direction.target)}
    return tuple(dict.fromkeys(code for code in known if code in spoken))


QuestionKind = Literal[
    "known", "composed", "unknowable", "verb", "verb_attractor", "adjective", "article", "undetermined"
]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
DECILES = 10


@dataclass(frozen=True)
class ChoiceQuestion:
    """Several sentences of which one is right: multiple choice.

    About a fact: a sentence with several values. About the word for a noun: then a sentence is given, and the others
    are translations of it in which that noun, or another one, stands. Or about agreement: a sentence, and the same with
    a word in another form.

    Attributes:
        kind: "known" = a fact that training told in other forms, or a noun that stood in other sentences; "composed" =
            two facts that it told, put together as it did not; "unknowable" = of an entity of whom it told nothing, or
            a noun that it never had. Of agreement "verb", "adjective" and "article", by the word that has to agree;
            "verb_attractor" = a verb in the form that another noun, between it and its subject, would ask for;
            "undetermined" = a control: a verb in another tense, where nothing says which.
        language: what the sentences are in.
        sentences: the sentence with each of the values or forms; they differ in nothing else but what agrees with a
            value.
        answer: number of the right one, from 0.
        decile: 0 = among the tenth of the facts or nouns that are told most often, to 9; of a composition that of its
            rarer fact. None of what is not told, and of agreement.
        source: the sentence that is given; None = none is.
        source_language: what that is in.
    """

    kind: QuestionKind
    language: str
    sentences: tuple[str, ...]
    answer: int
    decile: int | None = None
    source: str | None = None
    source_language: str | None = None


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


_Kind = TypeVar("_Kind", bound=type[Source])

KINDS: dict[str, type[Source]] = {}
"""Kinds of source by name, as `register_source` has been told of them."""


def register_source(kind: _Kind) -> _Kind:
    """Make a kind of source known by its `name`; a decorator of its class.

    Raises:
        ValueError: another class has that name.
    """
    other = KINDS.setdefault(kind.name, kind)
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"a kind of source needs a name of its own: {kind.name!r} is that of {other.__qualname__}.")
    KINDS[kind.name] = kind
    return kind


def source_class(kind: str) -> type[Source]:
    """The class of a kind of source.

    Raises:
        UserError: no such kind, with the nearest name.
    """
    if kind not in KINDS:
        raise UserError(f"the kind of source must be a known one: got {kind!r}. {nearest(kind, KINDS)}")
    return KINDS[kind]


def require_parameter(kinds: Iterable[str], name: str) -> None:
    """Make sure that one of some kinds of source reads text by the setting `name`; what is generated has none.

    Raises:
        UserError: none does; those that do are named.
    """
    chosen, takes = list(kinds), [kind for kind, made in KINDS.items() if {"path", name} <= made.parameters().keys()]
    if not set(takes) & set(chosen):
        raise UserError(
            f"data.{name} is for text of the kinds {', '.join(takes)}: got data.source {','.join(chosen)}. Leave "
            "it out."
        )


def open_source(kind: str, path: str | Path | None = None, **settings: Any) -> Source:
    """Open a corpus of one of the `KINDS`, such as those of `moekit.data.sources`: ``open_source("moses", "folder")``.

    Args:
        kind: The name of a class of a source: babel (generated, needs no path), facts (facts in languages of babel),
            headlines (paragraphs of babel with their headlines), moses, jsonl, tsv, examples (inputs and targets),
            gettext (without a path: the system's catalogs), text, or union.
        path: where the corpus lies. For union the members, as ``moses:path/one,jsonl:path/two``.
        settings: arguments of that kind's class (`BabelSettings` for babel; for headlines those of `Headlines`, and
            others for its corpus). For union, a mapping of arguments by kind of member, as ``moses={"pivot": "en"}``.

    Raises:
        UserError: for an unknown kind or setting, with the nearest name; and for whatever is wrong with the data.
    """
    return source_class(kind).open(path, **settings)


def digest(*parts: object) -> str:
    """Hex digest of the text forms of `parts`, kept apart from each other; bytes are taken as they are."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def chance(text: str) -> float:
    """A number in [0, 1) that belongs to the text: its hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
