"""Parallel text as Moses and OPUS store it: one file per language, line by line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from moekit.data.sources.aligned import AlignedBlock, AlignedSource
from moekit.data.sources.files import (
    SPLIT_NAMES,
    add_file,
    check_folder,
    read_lines,
    split_called,
    unpacked_name,
)
from moekit.errors import UserError
from moekit.source import Direction, Split, digest, language_code, register_source

_LANGUAGE = r"[A-Za-z]{2,3}(?:[-_@][A-Za-z0-9]+)*"
_PAIR = r"[A-Za-z]{2,3}[A-Za-z0-9_@]*-[A-Za-z]{2,3}[A-Za-z0-9_@]*"
_NAME = re.compile(rf"(?P<stem>.+?)\.(?:(?P<pair>{_PAIR})\.)?(?P<language>{_LANGUAGE})")
# Short endings too, but no languages.
_NO_LANGUAGES = frozenset(
    ["txt", "tsv", "csv", "md", "mo", "po", "gz", "zip", "xz", "bz", "log", "bpe", "spm", "py", "sh"]
)


@register_source
class Moses(AlignedSource):
    """A folder with ``train.en`` and ``train.de``, or ``train.en-de.en`` and ``train.en-de.de``; plain or ``.gz``.

    Any number of languages; files of one split without a pair in their name (``train.en``, ``train.de``, ``train.fr``)
    are aligned with each other. Splits may be called train or training; valid, dev, val or validation; test or tst.

    Args:
        path: the folder.
        pivot, directions, strict: see `AlignedSource`.
        stems: file names by split where they are others, as ``{"train": "europarl", "test": "newstest2014"}``.

    Raises:
        UserError: on bad input, naming file and line.
    """

    name = "moses"

    def __init__(
        self,
        path: str | Path,
        *,
        pivot: str | None = "auto",
        directions: Sequence[str | Direction] | None = None,
        strict: bool = False,
        stems: Mapping[str, str] | None = None,
    ) -> None:
        folder = check_folder(path, "moses")
        groups = _find(folder, stems)
        blocks = [_read(split, files) for (split, _), files in groups.items()]
        super().__init__(blocks, pivot=pivot, directions=directions, strict=strict)


def _find(folder: Path, stems: Mapping[str, str] | None) -> dict[tuple[Split, str], dict[str, Path]]:
    """Files by language, by split and pair ("" where the name has none)."""
    named: dict[str, Split] = {}
    for name, stem in (stems or {}).items():
        known = split_called(name)
        if known is None:
            raise UserError(f"moses: stems must name files of train, valid or test: got {name!r}.")
        named[stem] = known
    groups: dict[tuple[Split, str], dict[str, Path]] = {}
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    for path in paths:
        match = _NAME.fullmatch(unpacked_name(path))
        if match is None or match["language"].lower() in _NO_LANGUAGES:
            continue
        split = named.get(match["stem"]) if stems else split_called(match["stem"])
        if split is None:
            continue
        language, pair = language_code(match["language"]), match["pair"] or ""
        if pair and language not in pair.split("-"):
            raise UserError(f"{path}: the language must be one of the pair {pair}: got {language!r}. Rename the file.")
        add_file(groups.setdefault((split, pair), {}), language, path, f"{split} text of {language!r}")
    if not groups:
        names = named or ("train", *SPLIT_NAMES["valid"], "test")
        raise UserError(
            f"{folder}: parallel files must be named SPLIT.LANGUAGE or SPLIT.PAIR.LANGUAGE, as train.en and train.de "
            f"or train.en-de.en, plain or .gz, where SPLIT is one of {', '.join(names)}: "
            f"found none among {len(paths)} files."
        )
    return groups


def _read(split: Split, paths: Mapping[str, Path]) -> AlignedBlock:
    if len(paths) < 2:
        (path,) = paths.values()
        raise UserError(f"{path}: parallel text must have at least two languages: this file has no partner beside it.")
    files = {language: read_lines(path) for language, path in paths.items()}
    first, *others = files.values()
    for other in others:
        if len(other.lines) != len(first.lines):
            raise UserError(
                f"files that translate each other must have equally many lines: got {len(first.lines):,} in "
                f"{first.path} and {len(other.lines):,} in {other.path}. Line i of one must translate line i of the "
                "other."
            )
    return AlignedBlock(
        split=split,
        columns={language: [line.strip() for line in file.lines] for language, file in files.items()},
        files={language: str(path) for language, path in paths.items()},
        digest=digest(*(file.digest for file in files.values())),
    )
