"""The sentences that a run is evaluated on, as its folder keeps them: validation and test text, nothing of training."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from moekit.data.batch import Batch
from moekit.data.batching import Loader
from moekit.data.module import MultitaskData
from moekit.data.overlap import also_in_training
from moekit.data.store import SIDES, TokenStore, Wanted, monolingual_section, parallel_section, store_in_memory
from moekit.data.unwritable import unwritable
from moekit.errors import UserError
from moekit.source import Direction, Source, Split
from moekit.stored import parse_json

_FORMAT = 1
_SPLITS: tuple[Split, ...] = ("valid", "test")


@dataclass(frozen=True)
class Corpus:
    """The text that a run was trained on, described.

    Attributes:
        fingerprint: of its source.
        sentences: their number by section, as ``train/en-de/source``.
        training: what each task trained on; see `MultitaskData.summary`.
        repeated: what of the held-out text stands in it too; see `also_in_training`. None in files of former versions.
    """

    fingerprint: str
    sentences: Mapping[str, int]
    training: Mapping[str, Mapping[str, float | int]]
    repeated: Mapping[str, Mapping[str, Sequence[int]]] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeldOut(Source):
    """A source of validation and test text, in one compressed file.

    It holds, of each direction and language, the sentences that evaluation uses and no others.

    Attributes:
        name: the kind of source that they are from.
        languages: codes, in the order of their ids.
        directions: those of the task translation.
        tasks: that train, and so are validated.
        limits: at most so many sentences of each direction or language were kept, by split; None = all.
        settings: whatever says which text it is, as plain data; for the caller to compare.
        corpus: what they are from.
        sections: sentences by section.
        words: the salient words of each language, where a task seeks them.
    """

    name: str
    languages: tuple[str, ...]
    directions: tuple[Direction, ...]
    tasks: tuple[str, ...]
    limits: dict[str, int | None]
    settings: dict[str, Any]
    corpus: Corpus
    sections: Mapping[str, Sequence[str]]
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: MultitaskData, settings: Mapping[str, Any]) -> HeldOut:
        """What the data module of a run evaluates on; see the class for `settings`."""
        limits = {"valid": data.valid_sentences, "test": data.test_sentences}
        counts = {section: where.count for section, where in data.store.sections.items()}  # prepares the source
        sections = {}
        for texts, _ in data.wanted(_SPLITS).texts(data.source):
            for section, read in texts.items():
                sections[section] = list(read()[: limits[section.partition("/")[0]]])
        sought = data.languages if any(data.task(name).seeks_words for name in data.tasks) else ()
        named = {language: data.source.salient(language) for language in sought}
        return cls(
            name=data.source.name,
            languages=data.languages,
            directions=data.directions,
            tasks=tuple(data.tasks),
            limits=limits,
            settings=dict(settings),
            corpus=Corpus(data.source.fingerprint(), counts, data.summary(), also_in_training(data.store, limits)),
            sections=sections,
            words={language: sorted(words) for language, words in named.items() if words is not None},
        )

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Pairs of one direction, for validation or testing."""
        self.check_direction(direction)
        source, target = (self._section(parallel_section(direction, split, side)) for side in SIDES)
        return list(zip(source, target, strict=True))

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Sentences of one language, for validation or testing."""
        self.check_language(language)
        return self._section(monolingual_section(language, split))

    def salient(self, language: str) -> frozenset[str] | None:
        """The salient words of a language, where a task of the run seeks them."""
        self.check_language(language)
        return frozenset(self.words[language]) if language in self.words else None

    def fingerprint(self) -> str:
        """Digest of the sentences."""
        return hashlib.sha256(_canonical(self._plain())).hexdigest()

    def wanted(self, wanted: Wanted) -> Wanted:
        """What of `wanted` is here."""
        here = self.sections
        return Wanted(
            tuple((d, split) for d, split in wanted.parallel if parallel_section(d, split, "source") in here),
            tuple((code, split) for code, split in wanted.monolingual if monolingual_section(code, split) in here),
        )

    def write(self, file: IO[bytes]) -> None:
        """Write everything, compressed, with the digest of it."""
        content = {"format": _FORMAT, "digest": self.fingerprint(), **self._plain()}
        file.write(gzip.compress(_canonical(content), mtime=0))

    @classmethod
    def read(cls, path: Path) -> HeldOut:
        """Read what `write` wrote.

        Raises:
            UserError: if it cannot be read, or is not as it was written.
        """
        try:
            content = parse_json(gzip.decompress(path.read_bytes()))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']} instead of {_FORMAT}")
            texts = content["texts"]
            found = cls(
                name=content["name"],
                languages=tuple(content["languages"]),
                directions=tuple(Direction(*pair) for pair in content["directions"]),
                tasks=tuple(content["tasks"]),
                limits=content["limits"],
                settings=content["settings"],
                corpus=Corpus(**content["corpus"]),
                sections={section: texts[number] for section, number in content["sections"].items()},
                words=content.get("words", {}),
            )
            if found.fingerprint() != content["digest"]:
                raise ValueError("its digest differs")
        except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} must hold the sentences that the run is evaluated on, as they were written: it cannot be read "
                f"({error}). Take it from a copy of the run."
            ) from error
        return found

    def _section(self, name: str) -> Sequence[str]:
        if name not in self.sections:
            raise UserError(
                f"a run keeps the text that it is evaluated on, and no other: got {name}, and there are "
                f"{', '.join(self.sections)}. Training needs its corpus."
            )
        return self.sections[name]

    def _plain(self) -> dict[str, Any]:
        """Everything as plain data; sections with the same sentences share one list."""
        corpus = {name: value for name, value in asdict(self.corpus).items() if value is not None}
        numbers: dict[tuple[str, ...], int] = {}
        sections = {name: numbers.setdefault(tuple(text), len(numbers)) for name, text in self.sections.items()}
        return {
            "name": self.name,
            "languages": list(self.languages),
            "directions": [[direction.source, direction.target] for direction in self.directions],
            "tasks": list(self.tasks),
            "limits": self.limits,
            "settings": self.settings,
            "corpus": corpus,
            "sections": sections,
            "texts": [list(text) for text in numbers],
            **({"words": self.words} if self.words else {}),
        }


class HeldOutData(MultitaskData):
    """Validation and test batches of a run from the sentences that it keeps: the same ones as from its corpus.

    They are tokenized when they are first asked for, in memory; nothing is read from a cache, or written.

    Args:
        source: the sentences.
        options: as `MultitaskData`; `tokenizer` is required.
    """

    source: HeldOut

    def __init__(self, source: HeldOut, **options: Any) -> None:
        if options.get("tokenizer") is None:
            raise TypeError("HeldOutData needs the run's tokenizer: there is no text here to train one on.")
        super().__init__(source, **options)

    @property
    def store(self) -> TokenStore:
        """The tokens of validation and test text."""
        if self._store is None:
            self._store = store_in_memory(self.source, self.tokenizer, self.source.wanted(self.wanted(_SPLITS)))
        return self._store

    def train_dataloader(self) -> Loader[dict[str, Batch]]:
        """There is none.

        Raises:
            UserError: always.
        """
        raise UserError("training needs the corpus of the run: these are only the sentences that it is evaluated on.")

    def summary(self) -> dict[str, dict[str, float | int]]:
        """What each task was trained on, as it was recorded then."""
        training = self.source.corpus.training
        return {name: dict(training[name]) for name in self.tasks if name in training}


class TestTextData(MultitaskData):
    """Test batches of a source alone, as validation batches of the tasks that a test measures, so that all have losses.

    They are tokenized when they are first asked for, in memory; no training text is read or counted.

    Args:
        source: the text.
        options: as `MultitaskData`; `tokenizer` is required.
    """

    __test__ = False  # pytest takes names that begin so for tests

    def __init__(self, source: Source, **options: Any) -> None:
        if options.get("tokenizer") is None:
            raise TypeError("TestTextData needs a tokenizer: there is no training text here to train one on.")
        super().__init__(source, **options)

    @property
    def store(self) -> TokenStore:
        """The tokens of the test text."""
        if self._store is None:
            self._store = store_in_memory(self.source, self.tokenizer, self.wanted(("test",)))
        return self._store

    def val_dataloader(self) -> Loader[Batch] | list[Any]:
        """The batches of the test text."""
        return self.test_dataloader()


def remarks(data: MultitaskData, corpus: Corpus | None) -> list[str]:
    """What one should know of the held-out text before one reads scores on it, in sentences; of most runs nothing."""
    found = []
    for split, what, therefore in (
        ("valid", "validation", "the last checkpoint is the result"),
        ("test", "test", "nothing is tested"),
    ):
        numbers = data.evaluated("valid" if split == "valid" else "test")
        lacking = [task for task, sentences in numbers.items() if not sentences]
        if len(lacking) == len(numbers):
            found.append(f"No {what} text: {therefore}.")
        elif lacking:
            found.append(f"No {what} text for {', '.join(lacking)}.")
        repeated = (corpus.repeated or {}).get(split, {}) if corpus else {}
        counts = [f"{number:,} of {total:,} in {code}" for code, (number, total) in repeated.items()]
        if counts:
            found.append(f"{what.capitalize()} sentences also in the training text: {', '.join(counts)}.")
    return [*found, *_unwritable(data)]


def _unwritable(data: MultitaskData) -> Iterator[str]:
    """A sentence for each language of whose test references the tokenizer cannot write more than one in a hundred."""
    references: dict[str, dict[str, None]] = {}
    for direction in data.directions if any(data.task(name).scored for name in data.tasks) else ():
        pairs = data.pairs(direction, "test")[: data.test_sentences]
        references.setdefault(direction.target, {}).update(dict.fromkeys(target for _, target in pairs))
    for language, texts in references.items():
        number, characters = unwritable(data.tokenizer, list(texts))
        if number > len(texts) / 100:
            example = f" ({' '.join(characters)})" if characters else ""
            yield (
                f"Test references in {language} with characters that the tokenizer cannot write{example}: "
                f"{number:,} of {len(texts):,}. No translation equals them. See data.normalization_rule_name, of "
                "which identity keeps every character, and data.byte_fallback."
            )


def left_out(training: Mapping[str, Mapping[str, float | int]], max_length: int) -> list[str]:
    """A sentence for each task that cannot use more than one in a hundred training sentences, too long or empty."""
    counts = {name: (int(row["dropped"]), int(row["dropped"] + row["sentences"])) for name, row in training.items()}
    return [
        f"{name}: {dropped:,} of {total:,} training sentences are left out: they are empty, or longer than "
        f"data.max_length, {max_length} pieces (see data.too_long)."
        for name, (dropped, total) in counts.items()
        if dropped > total / 100
    ]


def _canonical(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
