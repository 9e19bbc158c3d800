"""Text of one language at a time: for denoising and language modelling, with nothing to translate."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from moekit.data.sources.files import PACKED, add_file, check_folder, entries, read_lines, split_called, unpacked_name
from moekit.data.sources.names import LanguageNames, looks_like_language
from moekit.errors import UserError
from moekit.source import SPLITS, Direction, Source, Split, chance, digest, language_code, register_source


@register_source
class Text(Source):
    """A folder with ``train.en`` (and ``valid.en``, ``test.en``), or ``en.txt``; plain or compressed.

    ``train.txt``, ``valid.txt`` and ``test.txt`` are the splits of one language: the one that the folder is named
    after, or the one of `languages`.

    Args:
        path: the folder.
        unit: "line" = every line is a sentence; "paragraph" = lines are joined until an empty one.
        valid_share: of a language without a validation file, this share is held out for validation, chosen by the
            hash of the sentence, so that it does not change when the file grows and no sentence is on both sides.
        test_share: likewise of a language without a test file, for testing.
        languages: which names are languages; see `LanguageNames`. Other files are left out, which is said.

    Raises:
        UserError: on bad input, naming file and line.
    """

    name = "text"

    def __init__(
        self,
        path: str | Path,
        *,
        unit: Literal["line", "paragraph"] = "line",
        valid_share: float = 0.01,
        test_share: float = 0.01,
        languages: Sequence[str] | Mapping[str, str] | None = None,
    ) -> None:
        if unit not in ("line", "paragraph"):
            raise UserError(f"text: unit must be line or paragraph: got {unit!r}.")
        for name, share in (("valid_share", valid_share), ("test_share", test_share)):
            if not 0 <= share < 0.5:
                raise UserError(f"text: {name} must be at least 0 and below 0.5: got {share}.")
        folder = check_folder(path, "text")
        names = LanguageNames(languages)
        files = _find(folder, names)
        names.say("text", folder)
        self.languages = tuple(dict.fromkeys(language for language, _ in files))
        self.directions: tuple[Direction, ...] = ()
        self._sentences: dict[tuple[str, Split], list[str]] = {}
        digests = []
        for (language, split), file_path in files.items():
            file = read_lines(file_path)
            digests.append(f"{language}:{split}:{file.digest}")
            sentences = _sentences(file.lines, unit)
            if not sentences:
                raise UserError(f"{file_path}: a file must hold text: got {len(file.lines)} empty lines.")
            self._sentences[language, split] = sentences
        self._fingerprint = digest("text", unit, valid_share, test_share, *digests)
        # From the two ends of the draw, so that what one share holds out does not depend on the other.
        self._hold_out("valid", lambda drawn: drawn < valid_share)
        self._hold_out("test", lambda drawn: drawn >= 1 - test_share)

    def _hold_out(self, split: Split, chosen: Callable[[float], bool]) -> None:
        """Take a split out of the training text of every language that has no file of it."""
        for language in self.languages:
            if (language, split) in self._sentences or (language, "train") not in self._sentences:
                continue
            everything = self._sentences[language, "train"]
            out = [chosen(chance(sentence)) for sentence in everything]
            self._sentences[language, "train"] = [s for s, o in zip(everything, out, strict=True) if not o]
            self._sentences[language, split] = [s for s, o in zip(everything, out, strict=True) if o]

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Always an error: nothing is parallel here."""
        raise UserError(
            f"text: monolingual text has no parallel pairs: got the direction {direction}. Use moses, jsonl or tsv, or "
            "train on denoising and language modelling alone."
        )

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Sentences of one language, each once, in the order of the file."""
        self.check_language(language)
        return list(dict.fromkeys(self._sentences.get((language, self.check_split(split)), [])))

    def fingerprint(self) -> str:
        """Digest of all content and the settings."""
        return self._fingerprint


def _find(folder: Path, names: LanguageNames) -> dict[tuple[str, Split], Path]:
    found: dict[tuple[str, Split], Path] = {}
    paths = [path for path in entries(folder) if path.is_file()]
    for path in paths:
        stem, dot, ending = unpacked_name(path).rpartition(".")
        split, language = split_called(stem), names.code(ending)
        if dot and ending == "txt":
            split, language = (split, _only(folder, path, names)) if split else _split_and_language(stem, names)
        if split is None or language is None:
            if dot and (split or ending == "txt"):
                names.leave_out([path.name])
            continue
        add_file(found, (language, split), path, f"{split} text of {language!r}")
    if not found:
        names.say("text", folder)
        raise UserError(
            f"{folder}: text files must be named {SPLITS[0]}.LANGUAGE, as train.en, or LANGUAGE.txt, as en.txt, "
            f"{PACKED}, or train.txt in a folder named after its language: found none among {len(paths)} files. "
            "Languages with names that are no codes are named with --data.languages."
        )
    return found


def _only(folder: Path, path: Path, names: LanguageNames) -> str:
    """The language of ``train.txt``."""
    name = folder.resolve().name
    if names.codes:
        code = names.codes[0] if len(names.codes) == 1 else names.code(name)
    else:
        code = language_code(name) if looks_like_language(name) else None
    if code is None:
        raise UserError(
            f"{path}: it must be known which language this is: the folder, {name}, is not named after one"
            f"{' of ' + ', '.join(names.codes) if names.codes else ''}. Name it, as --data.languages en, or rename the "
            f"file, as {split_called(path.name.partition('.')[0])}.en."
        )
    return code


def _split_and_language(stem: str, names: LanguageNames) -> tuple[Split, str | None]:
    """Of ``en``, ``train.en`` and ``en-train``, where ``.txt`` follows: text without a split is training text."""
    for separator in re.finditer(r"[._-]", stem):
        sides = stem[: separator.start()], stem[separator.end() :]
        for name, language in (sides, sides[::-1]):
            if split := split_called(name):
                return split, names.code(language)
    return "train", names.code(stem)


def _sentences(lines: list[str], unit: str) -> list[str]:
    stripped = [line.strip() for line in lines]
    if unit == "line":
        return [line for line in stripped if line]
    return [" ".join(paragraph) for filled, paragraph in itertools.groupby(stripped, key=bool) if filled]
