"""Text of one language at a time: for denoising and language modelling, with nothing to translate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from moekit.data.sources.files import add_file, check_folder, read_lines, split_called, unpacked_name
from moekit.errors import UserError
from moekit.source import SPLITS, Direction, Source, Split, chance, digest, language_code, register_source


@register_source
class Text(Source):
    """A folder with ``train.en`` (and ``valid.en``, ``test.en``), or ``en.txt``; plain or ``.gz``.

    Args:
        path: the folder.
        unit: "line" = every line is a sentence; "paragraph" = lines are joined until an empty one.
        valid_share: of a language without a validation file, this share is held out for validation, chosen by the
            hash of the sentence, so that it does not change when the file grows and no sentence is on both sides.
        test_share: likewise of a language without a test file, for testing.

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
    ) -> None:
        if unit not in ("line", "paragraph"):
            raise UserError(f"text: unit must be line or paragraph: got {unit!r}.")
        for name, share in (("valid_share", valid_share), ("test_share", test_share)):
            if not 0 <= share < 0.5:
                raise UserError(f"text: {name} must be at least 0 and below 0.5: got {share}.")
        folder = check_folder(path, "text")
        files = _find(folder)
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


def _find(folder: Path) -> dict[tuple[str, Split], Path]:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    found: dict[tuple[str, Split], Path] = {}
    for path in paths:
        stem, dot, ending = unpacked_name(path).rpartition(".")
        split = split_called(stem)
        if dot and ending == "txt":
            language, split = language_code(stem, str(path)), "train"
        elif split is not None:
            language = language_code(ending, str(path))
        else:
            continue
        add_file(found, (language, split), path, f"{split} text of {language!r}")
    if not found:
        raise UserError(
            f"{folder}: text files must be named {SPLITS[0]}.LANGUAGE, as train.en, or LANGUAGE.txt, as en.txt, plain "
            f"or .gz: found none among {len(paths)} files."
        )
    return found


def _sentences(lines: list[str], unit: str) -> list[str]:
    stripped = [line.strip() for line in lines]
    if unit == "line":
        return [line for line in stripped if line]
    return [" ".join(paragraph) for filled, paragraph in itertools.groupby(stripped, key=bool) if filled]
