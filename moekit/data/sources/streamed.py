"""`Streamed`: a source of text of one language at a time that stays where it lies, however long it is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moekit.data.cache import CorruptCacheError, cached_folder, content_key
from moekit.data.progress import counting
from moekit.data.sources.first_seen import Chosen, choose
from moekit.data.text_stream import TextStream
from moekit.errors import UserError
from moekit.source import Direction, Source, Split, digest
from moekit.stored import parse_json

Part = tuple[str, Split]
"""Language and split of text as it lies on disk."""
_Choices = dict[Part, dict[Split, Chosen]]
_FORMAT = 1


class Streamed(Source):
    """Text that is read anew each time it is needed.

    In memory is a bit for each sentence and split, which says whether the sentence belongs to it. `prepare` keeps these
    on disk, where all processes find them.
    """

    directions: tuple[Direction, ...] = ()

    def _hold(
        self,
        parts: Mapping[Part, Callable[[], Iterator[str]]],
        *,
        valid_share: float,
        test_share: float,
        fingerprint: str,
    ) -> None:
        """Say what there is; for the constructor.

        Args:
            parts: what walks through the sentences of a language and split, none of them empty.
            valid_share: of a language without validation text, this share is held out for validation, chosen by the
                hash of the sentence, so that it does not change when the text grows and no sentence is on both sides.
            test_share: likewise of a language without test text, for testing.
            fingerprint: of all content, and of the settings.

        Raises:
            UserError: a share is below 0, or 0.5 or more.
        """
        self.languages = tuple(dict.fromkeys(language for language, _ in parts))
        self._parts, self._fingerprint = dict(parts), fingerprint
        self._valid_share, self._test_share = valid_share, test_share
        self._chosen: _Choices = {}

    def check_shares(self, valid_share: float, test_share: float) -> None:
        """Raise UserError unless both shares are at least 0 and below 0.5."""
        for name, share in (("valid_share", valid_share), ("test_share", test_share)):
            if not 0 <= share < 0.5:
                raise UserError(f"{self.name}: {name} must be at least 0 and below 0.5: got {share}.")

    def prepare(self, cache: Path, *, progress: bool = True) -> None:
        """Find out which sentences belong to which split, unless the cache knows."""
        if len(self._chosen) == len(self._parts):
            return

        def build(folder: Path) -> None:
            counts = []
            for number, part in enumerate(self._parts):
                found = self._choose(part, folder, progress)
                for split, chosen in found.items():
                    chosen.bits.tofile(folder / f"{number}.{split}.bits")
                counts.append({split: chosen.count for split, chosen in found.items()})
            (folder / "counts.json").write_text(json.dumps(counts), encoding="utf-8")

        key = content_key(kind="text", format=_FORMAT, source=self._fingerprint)
        self._chosen = cached_folder(cache / "texts" / key, build, self._load)

    def _load(self, folder: Path) -> _Choices:
        try:
            counts = parse_json((folder / "counts.json").read_bytes())
            return {
                part: {
                    split: Chosen(_mapped(folder / f"{number}.{split}.bits"), int(count))
                    for split, count in counts[number].items()
                }
                for number, part in enumerate(self._parts)
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CorruptCacheError(f"{folder} must say which sentences belong to which split: {error!r}.") from error

    def _choose(self, part: Part, folder: Path, progress: bool = False) -> dict[Split, Chosen]:
        language, split = part
        shares: dict[Split, tuple[float, float]] = {split: (0.0, 1.0)}
        if split == "train":
            # From the two ends of the draw, so that what one share holds out does not depend on the other.
            low = 0.0 if (language, "valid") in self._parts else self._valid_share
            high = 1.0 if (language, "test") in self._parts else 1 - self._test_share
            shares = {"train": (low, high)}
            shares |= {"valid": (0.0, low)} if low > 0 else {}
            shares |= {"test": (high, 1.0)} if high < 1 else {}
        with counting(f"Reading {language} {split}", shown=progress) as counted:
            return choose(counted(self._parts[part]()), shares, folder)

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Always an error: nothing is parallel here."""
        raise UserError(
            f"{self.name}: monolingual text has no parallel pairs: got the direction {direction}. Use moses, jsonl or "
            "tsv, or train on denoising and language modelling alone."
        )

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Sentences of one language, each once, in the order of the text; they are read when they are walked through.

        The first time without `prepare` all text of the language is read to its end.
        """
        self.check_language(language)
        part = (language, self.check_split(split))
        if part not in self._parts:
            part = (language, "train")
        if part not in self._parts:
            return []
        if part not in self._chosen:
            with tempfile.TemporaryDirectory(prefix="moekit-") as folder:
                self._chosen[part] = self._choose(part, Path(folder))
        chosen = self._chosen[part].get(split)
        if chosen is None:
            return []
        identity = digest(self._fingerprint, language, split)
        return TextStream(partial(_walk, chosen, self._parts[part]), chosen.count, identity)

    def fingerprint(self) -> str:
        """Digest of all content and the settings."""
        return self._fingerprint


def each_once(texts: Sequence[Sequence[str]]) -> Sequence[str]:
    """Texts one after the other, each sentence where it comes first; they are walked through once to find these."""

    def everything() -> Iterator[str]:
        return chain.from_iterable(texts)

    if not any(isinstance(text, TextStream) for text in texts):
        return list(dict.fromkeys(everything()))
    with tempfile.TemporaryDirectory(prefix="moekit-") as folder:
        chosen = choose(everything(), {"train": (0.0, 1.0)}, Path(folder))["train"]
    identity = digest(
        "each once", *(text.identity if isinstance(text, TextStream) else digest(*text) for text in texts)
    )
    return TextStream(partial(_walk, chosen, everything), chosen.count, identity)


def _walk(chosen: Chosen, walk: Callable[[], Iterable[str]]) -> Iterator[str]:
    return chosen.of(walk())


def _mapped(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=np.uint8)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def units(lines: Iterable[str], unit: str) -> Iterator[str]:
    """The sentences of lines: those that are not empty; or lines joined until an empty one (paragraph), or to the end
    (document).
    """
    stripped = map(str.strip, lines)
    if unit == "line":
        return filter(None, stripped)
    if unit == "document":
        return filter(None, [" ".join(filter(None, stripped))])
    return (" ".join(paragraph) for filled, paragraph in groupby(stripped, key=bool) if filled)
