"""Which sentences of a long text stand in it for the first time, and to which split each belongs.

Every sentence is known by its hash. The hashes of a short text are compared in memory; those of a long one go to files
by a part of them, so that a file's worth is compared at a time, whatever the length of the text. What stays is a bit
for each sentence and split.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moekit.data.text_stream import in_chunks
from moekit.source import Split

_CHUNK = 1024  # sentences; a multiple of the bits of a byte
_IN_MEMORY = 1 << 19  # hashes, of 50 bytes with all that is made of them
_FILES = 256
_HASH = np.dtype([("key", np.uint64), ("number", np.int64)])


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some sentences of a text.

    Attributes:
        bits: UInt8[ceil(n / 8)], one bit for each of the n sentences, the first in the highest bit.
        count: how many are chosen.
    """

    bits: NDArray[np.uint8]
    count: int

    def of(self, sentences: Iterable[str]) -> Iterator[str]:
        """Those of the sentences of the text."""
        for place, chunk in enumerate(in_chunks(sentences, _CHUNK, None)):
            first = place * _CHUNK // 8
            yield from itertools.compress(chunk, np.unpackbits(self.bits[first : first + _CHUNK // 8]).tolist())


def choose(sentences: Iterable[str], shares: Mapping[Split, tuple[float, float]], folder: Path) -> dict[Split, Chosen]:
    """The sentences of each split, each where it comes first.

    Args:
        sentences: the text.
        shares: of each split, where the `moekit.source.chance` of its sentences lies: from one number up to another.
        folder: empty; hashes are there meanwhile, 16 bytes for each sentence of a long text.

    Returns:
        By split. Two different sentences are taken for the same with a probability of 2 ** -71 for a pair.
    """
    bits: dict[Split, list[NDArray[np.uint8]]] = {split: [] for split in shares}
    seen = _Hashes(folder)
    with contextlib.closing(seen):
        for chunk in in_chunks(sentences, _CHUNK, None):
            digests = b"".join([hashlib.sha256(sentence.encode()).digest() for sentence in chunk])
            words = np.frombuffer(digests, dtype=">u8").reshape(-1, 4).astype(np.uint64)
            seen.add(words[:, 1], (words[:, 2] % np.uint64(_FILES)).astype(np.int64))
            chance = (words[:, 0] >> np.uint64(16)).astype(np.float64) / 2.0**48
            for split, (low, high) in shares.items():
                bits[split].append(np.packbits((low <= chance) & (chance < high)))
        found = {split: np.concatenate([np.zeros(0, np.uint8), *parts]) for split, parts in bits.items()}
        for numbers in seen.repeated():
            erased = ~(np.uint8(0x80) >> (numbers & 7).astype(np.uint8))
            for chosen in found.values():
                np.bitwise_and.at(chosen, numbers >> 3, erased)
    return {split: Chosen(chosen, _ones(chosen)) for split, chosen in found.items()}


def _ones(bits: NDArray[np.uint8]) -> int:
    return sum(int(np.unpackbits(bits[i : i + _IN_MEMORY]).sum()) for i in range(0, len(bits), _IN_MEMORY))


class _Hashes:
    """Hashes in the order in which they are added, and which of them came before."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, contextlib.ExitStack()
        self._paths = [folder / f"hashes-{file}.bin" for file in range(_FILES)]
        self._waiting: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
        self._number = self._held = 0
        self._spilled = False

    def add(self, keys: NDArray[np.uint64], files: NDArray[np.int64]) -> None:
        """Add UInt64[n] keys, and the numbers of the files that they would go to."""
        self._waiting.append((keys, files))
        self._held += len(keys)
        if self._held >= _IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        if not self._spilled:
            self._out = [self._files.enter_context(path.open("ab")) for path in self._paths]
            self._spilled = True
        hashes, files = self._taken()
        order = np.argsort(files, kind="stable")
        edges = np.searchsorted(files[order], np.arange(_FILES + 1))
        hashes = hashes[order]
        for out, (begin, end) in zip(self._out, itertools.pairwise(edges), strict=True):
            out.write(hashes[begin:end].tobytes())

    def _taken(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """The hashes that wait, with their numbers."""
        hashes = np.empty(self._held, dtype=_HASH)
        hashes["key"] = np.concatenate([np.zeros(0, np.uint64), *(keys for keys, _ in self._waiting)])
        hashes["number"] = np.arange(self._number, self._number + self._held)
        files = np.concatenate([np.zeros(0, np.int64), *(files for _, files in self._waiting)])
        self._number, self._held, self._waiting = self._number + self._held, 0, []
        return hashes, files

    def repeated(self) -> Iterator[NDArray[np.int64]]:
        """Numbers of the hashes that came before."""
        if not self._spilled:
            hashes, files = self._taken()
            # All files at once; a key is one of its file.
            yield _repeated(hashes, files)
            return
        self._spill()
        self._files.close()
        for path in self._paths:
            hashes = np.fromfile(path, dtype=_HASH)
            yield _repeated(hashes, np.zeros(len(hashes), dtype=np.int64))

    def close(self) -> None:
        """Remove what is on the disk."""
        self._files.close()
        for path in self._paths if self._spilled else ():
            path.unlink(missing_ok=True)


def _repeated(hashes: NDArray[np.void], files: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.lexsort((files, hashes["key"]))  # stable: the first of the same comes first
    keys, files = hashes["key"][order], files[order]
    again = (keys[1:] == keys[:-1]) & (files[1:] == files[:-1])
    return hashes["number"][order][1:][again]
