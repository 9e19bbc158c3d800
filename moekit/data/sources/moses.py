"""Parallel text as Moses, OPUS, FLORES and WMT store it: one file per language, line by line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moekit.data.sources.aligned import AlignedBlock, AlignedSource
from moekit.data.sources.files import (
    PACKED,
    SPLIT_NAMES,
    add_file,
    check_folder,
    entries,
    read_lines,
    split_called,
    unpacked_name,
)
from moekit.data.sources.names import LanguageNames
from moekit.errors import UserError
from moekit.source import Direction, Split, digest, language_code, register_source

_PAIR = r"[A-Za-z]{2,3}[A-Za-z0-9_@]*-[A-Za-z]{2,3}[A-Za-z0-9_@]*"
_USUAL = re.compile(rf"(?P<stem>.+?)\.(?:(?P<pair>{_PAIR})\.)?(?P<language>[^.]+)")
# opus.en-de-train.en, Europarl.de-en.de
_OF_PAIR = re.compile(rf"(?:(?P<corpus>.+?)[._-])?(?P<pair>{_PAIR})(?:[.-](?P<split>[A-Za-z]+))?\.(?P<language>[^.]+)")
_SEPARATOR = re.compile(r"[._-]")


@dataclass(frozen=True)
class _Group:
    """Files that are aligned with each other: of one split, of one pair where the names say so, of one corpus."""

    split: Split
    pair: str = ""
    corpus: str = ""


@register_source
class Moses(AlignedSource):
    """A folder with ``train.en`` and ``train.de``, or ``train.en-de.en`` and ``train.en-de.de``; plain or compressed.

    Any number of languages; files of one split without a pair in their name (``train.en``, ``train.de``, ``train.fr``)
    are aligned with each other. Splits may be called train or training; valid, dev, val or validation; test or tst.

    Where there is no training text of such names, those of published corpora are read too: of OPUS
    (``opus.en-de-train.en``, ``Europarl.de-en.de``), of FLORES (``eng_Latn.dev``; ``devtest`` is for testing), of WMT
    and OpenNMT (``newstest2014.de``, ``src-train.txt``, with `languages` to say what src is); and where the folder
    itself has none, in the folders one below. Several corpora of a pair are one after the other.

    Args:
        path: the folder.
        pivot, directions, strict: see `AlignedSource`.
        languages: which endings of names are languages; see `LanguageNames`.
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
        languages: Sequence[str] | Mapping[str, str] | None = None,
    ) -> None:
        folder, names = check_folder(path, "moses"), LanguageNames(languages)
        blocks = [_read(group.split, files) for group, files in _find(folder, stems, names).items()]
        names.say("moses", folder)
        super().__init__(blocks, pivot=pivot, directions=directions, strict=strict)


def _find(folder: Path, stems: Mapping[str, str] | None, names: LanguageNames) -> dict[_Group, dict[str, Path]]:
    """Files by language, by what they are aligned with."""
    named: dict[str, Split] = {}
    for name, stem in (stems or {}).items():
        known = split_called(name)
        if known is None:
            raise UserError(f"moses: stems must name files of train, valid or test: got {name!r}.")
        named[stem] = known
    inside = entries(folder)
    groups = _grouped(inside, lambda name: _usual(name, named), names)
    if not named and not any(group.split == "train" for group in groups):
        groups = _grouped(inside, lambda name: _published(name, names), names)
        for below in () if groups else (entry for entry in inside if entry.is_dir()):
            found = _grouped(entries(below), lambda name: _published(name, names), names)
            groups |= {replace(group, corpus=f"{below.name}/{group.corpus}"): files for group, files in found.items()}
    if names.codes:  # of other pairs too one side may be asked for
        groups = {group: files for group, files in groups.items() if len(files) > 1}
    if not groups:
        names.say("moses", folder)
        wanted = named or ("train", *SPLIT_NAMES["valid"], "test")
        raise UserError(
            f"{folder}: parallel files must be named SPLIT.LANGUAGE or SPLIT.PAIR.LANGUAGE, as train.en and train.de "
            f"or train.en-de.en, {PACKED}, where SPLIT is one of {', '.join(wanted)}: found none among "
            f"{sum(path.is_file() for path in inside)} files. Where names do not say the language, as src-train.txt "
            "and tgt-train.txt, say it with --data.languages src=en,tgt=de."
        )
    return groups


def _grouped(
    paths: Sequence[Path], parse: Callable[[str], tuple[_Group, str] | None], names: LanguageNames
) -> dict[_Group, dict[str, Path]]:
    groups: dict[_Group, dict[str, Path]] = {}
    for path in paths:
        found = parse(unpacked_name(path)) if path.is_file() else None
        if found is None:
            continue
        group, language = found
        if (code := names.code(language)) is None:
            names.leave_out([path.name])
            continue
        if group.pair and not _in_pair(language, group.pair):
            raise UserError(
                f"{path}: the language must be one of the pair {group.pair}: got {language!r}. Rename the file."
            )
        add_file(groups.setdefault(group, {}), code, path, f"{group.split} text of {code!r}")
    return groups


def _in_pair(language: str, pair: str) -> bool:
    return language_code(language) in pair.split("-")


def _usual(name: str, stems: Mapping[str, Split]) -> tuple[_Group, str] | None:
    """What files are aligned with and the language, of a name such as ``train.en`` or ``train.en-de.en``."""
    match = _USUAL.fullmatch(name)
    split = match and (stems.get(match["stem"]) if stems else split_called(match["stem"]))
    return (_Group(split, match["pair"] or ""), match["language"]) if match and split else None


def _published(name: str, names: LanguageNames) -> tuple[_Group, str] | None:
    """The same of the names that published corpora have."""
    if usual := _usual(name, {}):
        return usual
    match = _OF_PAIR.fullmatch(name)
    pair, language = (match["pair"], match["language"]) if match else ("", "")
    if match and all(map(names.code, pair.split("-"))) and (not names.code(language) or _in_pair(language, pair)):
        corpus, split = match["corpus"] or "", match["split"] or ""
        return _Group(_split_in(split) or _split_in(corpus) or "train", pair, corpus), language
    # eng_Latn.dev; src-train.txt, train.en.txt
    base = name.removesuffix(".txt")
    for separator in _SEPARATOR.finditer(base):
        sides = base[: separator.start()], base[separator.end() :]
        for split, side in (sides, sides[::-1]):
            known: Split | None = "test" if split == "devtest" else split_called(split)
            if known and (base != name or (names.code(side) and separator[0] == ".")):
                return _Group(known), side
    if (match := _USUAL.fullmatch(name)) and (known := _split_in(match["stem"])):
        return _Group(known, corpus=match["stem"]), match["language"]
    return None


def _split_in(stem: str) -> Split | None:
    """The split that a part of a name says, as ``news-train`` and ``newstest2014`` do."""
    for part in _SEPARATOR.split(stem):
        if split := split_called(part.rstrip("0123456789").removeprefix("news")):
            return split
    return None


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
