"""`TokenStore`: all sentences of a corpus as token ids in one memory-mapped file.

A store is cut into named sections, for example ``train/en-de/source`` or ``valid/de``. Sections that hold the same
sentences (the English side of en-de and of de-en) are stored once. All sections share one array of tokens, so a batch
that mixes any of them is gathered by one indexing operation.
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moekit.data.cache import CorruptCacheError, cached_folder, content_key
from moekit.data.progress import bar_of
from moekit.data.ragged import Ragged
from moekit.data.text_stream import TextStream, in_chunks
from moekit.data.tokenizer import Tokenizer
from moekit.environment import usable_cores
from moekit.errors import UserError
from moekit.source import Direction, Source, Split, digest
from moekit.stored import parse_json

_FORMAT = 1
_TYPES = ("uint16", "uint32")
SIDES: tuple[Literal["source", "target"], ...] = ("source", "target")


@dataclass(frozen=True)
class Section:
    """Sentences ``first .. first + count - 1`` of a store."""

    first: int
    count: int


class TokenStore:
    """Reads a store written by `build_store`; cheap to open and to send to another process.

    Args:
        folder: holds ``tokens.bin``, ``offsets.bin`` and ``header.json``; that they are as they were written is
            compared by `cached_store`.
        in_memory: read everything now; the folder is not needed any more, and other processes do not get the store.

    Raises:
        CorruptCacheError: if a file is missing or cut short, or the header is of no store of these files.
    """

    def __init__(self, folder: Path | str, *, in_memory: bool = False) -> None:
        self.folder = Path(folder)
        self.in_memory = in_memory
        header = _read_header(self.folder)
        self.sections = header.sections
        self.dtype = header.dtype
        for name, size in header.sizes.items():
            _check_size(self.folder / name, size)
        read = np.fromfile if in_memory else _mapped
        self.offsets: NDArray[np.int64] = read(self.folder / "offsets.bin", np.dtype(np.int64))
        self.tokens: NDArray[Any] = read(self.folder / "tokens.bin", self.dtype)

    def section(self, name: str) -> Section:
        """Where the section `name` is."""
        if name not in self.sections:
            raise KeyError(f"The store has no section {name!r}: it has {', '.join(self.sections)}.")
        return self.sections[name]

    def _edges(self, name: str) -> NDArray[np.int64]:
        """Int64[count + 1]: where the sentences of a section begin, and where the last one ends."""
        where = self.section(name)
        return np.asarray(self.offsets[where.first : where.first + where.count + 1])

    def lengths(self, name: str) -> NDArray[np.int64]:
        """Int64[count]: tokens of each sentence of a section."""
        return np.diff(self._edges(name))

    def starts(self, name: str) -> NDArray[np.int64]:
        """Int64[count]: the place of each sentence's first token among all tokens."""
        return self._edges(name)[:-1]

    def bounds(self, name: str, limit: int | None = None) -> tuple[int, int]:
        """Where the tokens of a section begin and end; of its first `limit` sentences."""
        edges = self._edges(name)[: None if limit is None else limit + 1]
        return int(edges[0]), int(edges[-1])

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Ragged:
        """Pieces of text, wherever sentences begin and end.

        Args:
            starts: Int64[B], the place of each one's first token among all tokens.
            lengths: Int64[B], how many tokens to read of each.
        """
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        places = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
        return Ragged(self.tokens[places].astype(np.int64), lengths)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        if self.in_memory:
            raise TypeError("A token store in memory cannot be sent to another process. Use cached_store.")
        return (TokenStore, (self.folder,))


def parallel_section(direction: Direction, split: Split, side: Literal["source", "target"]) -> str:
    """Name of the section with one side of a direction."""
    return f"{split}/{direction}/{side}"


def monolingual_section(language: str, split: Split) -> str:
    """Name of the section with the text of a language."""
    return f"{split}/{language}"


@dataclass(frozen=True)
class Wanted:
    """What a store shall hold: parallel directions and monolingual languages, by split."""

    parallel: tuple[tuple[Direction, Split], ...] = ()
    monolingual: tuple[tuple[str, Split], ...] = ()

    def texts(self, source: Source) -> Iterator[tuple[dict[str, Callable[[], Sequence[str]]], str]]:
        """Pieces of work: for each, the texts of its sections by name, and what to call it."""
        for direction, split in self.parallel:
            pairs = source.parallel(direction, split)
            names = [parallel_section(direction, split, side) for side in SIDES]
            yield {name: _side(pairs, i) for i, name in enumerate(names)}, f"{direction} {split}"
        for language, split in self.monolingual:
            text = source.monolingual(language, split)
            yield {monolingual_section(language, split): functools.partial(_held, text)}, f"{language} {split}"

    def names(self) -> list[str]:
        """Names of all sections."""
        pairs = [parallel_section(d, split, side) for d, split in self.parallel for side in SIDES]
        return pairs + [monolingual_section(language, split) for language, split in self.monolingual]


def _side(pairs: Sequence[tuple[str, str]], index: int) -> Callable[[], list[str]]:
    return lambda: [pair[index] for pair in pairs]


def _held(text: Sequence[str]) -> Sequence[str]:
    """Text that is walked through twice: a stream as it is, other text made once."""
    return text if isinstance(text, TextStream) else list(text)


def cached_store(
    source: Source, tokenizer: Tokenizer, wanted: Wanted, *, cache_dir: Path | str, progress: bool = True
) -> TokenStore:
    """Open the store of `wanted`, building it first if the cache does not have it; several processes may ask at once.

    Raises:
        UserError: if the cache folder is full or cannot be written.
    """
    key = content_key(
        kind="store",
        format=_FORMAT,
        source=source.fingerprint(),
        tokenizer=tokenizer.fingerprint,
        sections=wanted.names(),
    )
    return cached_folder(
        Path(cache_dir) / "stores" / key,
        lambda folder: build_store(folder, source, tokenizer, wanted, progress=progress),
        TokenStore,
    )


def store_in_memory(source: Source, tokenizer: Tokenizer, wanted: Wanted) -> TokenStore:
    """Encode `wanted` into memory, for little text that has no cache."""
    with tempfile.TemporaryDirectory(prefix="moekit-") as folder:
        build_store(Path(folder), source, tokenizer, wanted, progress=False)
        return TokenStore(folder, in_memory=True)


def build_store(folder: Path, source: Source, tokenizer: Tokenizer, wanted: Wanted, *, progress: bool = True) -> None:
    """Encode `wanted` into the existing, empty `folder`. Use `cached_store` unless you move it into place yourself.

    In memory are some thousand sentences at a time of text that comes as a `TextStream`, and of other text one side of
    a direction. They are encoded by as many threads as there are cores; the result is the same for any number.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    sections: dict[str, Section] = {}
    seen: dict[str, Section] = {}
    stored = 0
    with (
        (folder / "tokens.bin").open("wb") as tokens,
        (folder / "offsets.bin").open("wb") as offsets,
        bar_of(shown=progress) as bar,
    ):
        end = np.zeros(1, dtype=np.int64)
        offsets.write(end.tobytes())
        for texts, title in wanted.texts(source):
            for name, read in texts.items():
                text = read()
                content = text.identity if isinstance(text, TextStream) else digest(*text)
                if content not in seen:
                    task = bar.add_task(f"Encoding {title}", total=len(text))
                    first = stored
                    for chunk in in_chunks(text):
                        encoded = tokenizer.encode_batch(chunk, threads=usable_cores())
                        sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
                        flat = itertools.chain.from_iterable(encoded)
                        tokens.write(np.fromiter(flat, dtype=dtype, count=int(sizes.sum())).tobytes())
                        ends = end[-1] + np.cumsum(sizes)
                        offsets.write(ends.tobytes())
                        end, stored = ends[-1:], stored + len(chunk)
                        bar.advance(task, len(chunk))
                    bar.remove_task(task)
                    if stored - first != len(text):
                        raise UserError(
                            f"{source.name}: text must be the same each time it is read: {title} had {len(text):,} "
                            f"sentences, and then {stored - first:,}. Begin again when nothing writes to it."
                        )
                    seen[content] = Section(first, len(text))
                sections[name] = seen[content]
    header = {
        "format": _FORMAT,
        "dtype": dtype.name,
        "sections": {name: [where.first, where.count] for name, where in sections.items()},
        "files": {name: {"size": (folder / name).stat().st_size} for name in ("tokens.bin", "offsets.bin")},
    }
    (folder / "header.json").write_bytes(json.dumps(header, indent=1).encode())


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype[Any]
    sections: dict[str, Section]
    sizes: dict[str, int]  # of files, in bytes


def _read_header(folder: Path) -> _Header:
    path = folder / "header.json"
    try:
        header: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        version = header["format"]
        if version != _FORMAT:
            raise _damaged(folder, f"{path} must have format {_FORMAT}: got {version}.")
        if header["dtype"] not in _TYPES:
            raise ValueError(f"tokens are of type {' or '.join(_TYPES)}, not {header['dtype']!r}")
        dtype = np.dtype(header["dtype"])
        sizes = {name: int(header["files"][name]["size"]) for name in ("tokens.bin", "offsets.bin")}
        sentences = sizes["offsets.bin"] // 8 - 1
        if sizes["tokens.bin"] % dtype.itemsize or sizes["offsets.bin"] != 8 * (sentences + 1) or sentences < 0:
            raise ValueError(f"files of {sizes} bytes hold no whole numbers")
        sections = {name: Section(int(first), int(count)) for name, (first, count) in header["sections"].items()}
        for name, where in sections.items():
            if not 0 <= where.first <= where.first + where.count <= sentences:
                raise ValueError(f"section {name} lies outside of {sentences} sentences")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _damaged(folder, f"{folder} must be a token store: {path.name} is missing.") from error
    except CorruptCacheError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged(folder, f"{path} must be the header of a token store: it cannot be read ({error}).") from error
    return _Header(dtype, sections, sizes)


def _check_size(path: Path, promised: int) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size != promised:
        got = "it is missing" if size < 0 else f"it has {size:,}"
        raise _damaged(path.parent, f"{path} must have {promised:,} bytes: {got}.")


def _damaged(folder: Path, how: str) -> CorruptCacheError:
    return CorruptCacheError(f"{how} Remove the folder {folder} to build it again.")


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
