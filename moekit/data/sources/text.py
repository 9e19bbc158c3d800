"""Text of one language at a time: for denoising and language modelling, with nothing to translate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from moekit.data.sources.blocks import CheckedFile, check_file, walk_lines
from moekit.data.sources.files import PACKED, add_file, check_folder, entries, split_called, unpacked_name
from moekit.data.sources.names import LanguageNames, looks_like_language
from moekit.data.sources.streamed import Streamed, units
from moekit.errors import UserError
from moekit.source import SPLITS, Split, digest, language_code, register_source


@register_source
class Text(Streamed):
    """A folder with ``train.en`` (and ``valid.en``, ``test.en``), or ``en.txt``; plain or compressed.

    ``train.txt``, ``valid.txt`` and ``test.txt`` are the splits of one language: the one that the folder is named
    after, or the one of `languages`.

    Args:
        path: the folder.
        unit: "line" = every line is a sentence; "paragraph" = lines are joined until an empty one.
        valid_share: of a language without a validation file, this share is held out for validation; see `Streamed`.
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
            raise UserError(
                f"text: unit must be line or paragraph: got {unit!r}. A document of its own is a row of the kinds "
                "documents and datasets."
            )
        self.check_shares(valid_share, test_share)
        folder = check_folder(path, "text")
        names = LanguageNames(languages)
        files = {part: check_file(file) for part, file in _find(folder, names).items()}
        names.say("text", folder)
        for file in files.values():
            if not file.filled:
                raise UserError(f"{file.path}: a file must hold text: got {file.lines} empty lines.")
        digests = [f"{language}:{split}:{file.digest}" for (language, split), file in files.items()]
        self._hold(
            {part: partial(_sentences, file, unit) for part, file in files.items()},
            valid_share=valid_share,
            test_share=test_share,
            fingerprint=digest("text", unit, valid_share, test_share, *digests),
        )


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


def _sentences(file: CheckedFile, unit: str) -> Iterator[str]:
    return units(walk_lines(file), unit)
