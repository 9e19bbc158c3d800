"""The index of a checkpoint: which bytes of which file are which part of which tensor. JSON, and checked."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.folder_kinds import INDEX as INDEX
from moekit.mapped import DTYPES
from moekit.stored import parse_json

FORMAT = 1
# For whoever looks into the folder because a program that knows files alone has refused it.
ABOUT = (
    "A checkpoint of moekit's ExpertParallelStrategy, in a folder: Trainer(strategy=ExpertParallelStrategy(...)) reads "
    "it. moekit.training.whole_checkpoint.consolidate_checkpoint(folder, file) makes a file of it, which plain "
    "Lightning reads (load_from_checkpoint too); moekit.parallel.consolidate(folder, file) one of its weights."
)

_TYPES = {str(dtype): dtype for dtype in DTYPES.values()}
_FILE = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it lies.

    Attributes:
        offsets: The place of its first entry in the tensor, by dimension.
        sizes: The number of its entries, by dimension.
        file: The safetensors file that holds it, relative to the checkpoint.
        key: Its name in that file.
        digest: SHA-256 of its bytes, or None where nobody has taken it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str
    digest: str | None

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in chunks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def empty(self, device: str = "cpu") -> Tensor:
        """Memory for the whole of it."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Index:
    """All tensors of a checkpoint, and the file of what is not a tensor.

    Attributes:
        entries: The tensors, by name.
        plain: The file and the SHA-256 of what is no tensor, or None.
        processes: The number of processes that wrote the checkpoint.
    """

    entries: Mapping[str, StoredTensor]
    plain: tuple[str, str] | None = None
    processes: int = 1

    def under(self, prefix: str) -> dict[str, StoredTensor]:
        """The tensors whose names begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): entry for name, entry in self.entries.items() if name.startswith(prefix)}

    def dump(self) -> str:
        """As JSON, with a digest of itself."""
        body = {
            "about": ABOUT,
            "format": FORMAT,
            "processes": self.processes,
            "plain": self.plain,
            "tensors": {
                name: {
                    "shape": entry.shape,
                    "dtype": str(entry.dtype),
                    "chunks": [astuple(chunk) for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets)],
                }
                for name, entry in sorted(self.entries.items())
            },
        }
        return json.dumps({"digest": _digest(body), **body})

    def check(self, where: str) -> None:
        """Every number of every tensor is there once, and no two parts share bytes.

        Raises:
            UserError: Naming the tensor.
        """
        seen: dict[tuple[str, str], str] = {}
        for name, entry in self.entries.items():
            for chunk in entry.chunks:
                if not chunk.numel:
                    continue
                place = chunk.file, chunk.key
                if place in seen:
                    raise UserError(
                        f"the checkpoint {where} gives the same bytes, {chunk.key} of {chunk.file}, to two parts of "
                        f"{name} or {seen[place]}: one of them is missing. Use another checkpoint."
                    )
                seen[place] = name
            _check_tiling(name, entry, where)


def _check_tiling(name: str, entry: StoredTensor, where: str) -> None:
    """The chunks of a tensor lie inside it, do not overlap, and are as many numbers as it has."""
    chunks = [chunk for chunk in entry.chunks if chunk.numel]
    for chunk in chunks:
        ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > length for end, length in zip(ends, entry.shape, strict=True)):
            raise UserError(
                f"the checkpoint {where} has a part of {name} that lies outside of its shape {entry.shape}."
            )
    found = sum(chunk.numel for chunk in chunks)
    if found < math.prod(entry.shape):
        rows = _missing_rows(chunks, entry.shape)
        raise UserError(
            f"the checkpoint {where} is not complete: of {name}, shape {entry.shape}, it holds {found:,} of "
            f"{math.prod(entry.shape):,} numbers{rows}. Use another checkpoint."
        )
    if entry.shape:
        sweep = max(range(len(entry.shape)), key=lambda d: len({c.offsets[d] for c in chunks}))
        active: list[tuple[int, int]] = []
        for number, chunk in sorted(enumerate(chunks), key=lambda pair: pair[1].offsets[sweep]):
            del active[: bisect.bisect_right(active, (chunk.offsets[sweep], len(chunks)))]
            for _, other in active:
                if _overlap(chunk, chunks[other]):
                    raise UserError(
                        f"the checkpoint {where} holds parts of {name} twice, at {chunk.offsets} and at "
                        f"{chunks[other].offsets}. Use another checkpoint."
                    )
            bisect.insort(active, (chunk.offsets[sweep] + chunk.sizes[sweep], number))


def _missing_rows(chunks: list[Chunk], shape: tuple[int, ...]) -> str:
    """Which entries of the first dimension (experts, say) no chunk touches, for a message."""
    if not shape:
        return ""
    there = [False] * shape[0]
    for chunk in chunks:
        there[chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]] = [True] * chunk.sizes[0]
    gone = [str(row) for row, found in enumerate(there) if not found]
    return (
        f"; nothing at {', '.join(gone[:8])}{', ...' if len(gone) > 8 else ''} of its first dimension" if gone else ""
    )


def _overlap(a: Chunk, b: Chunk) -> bool:
    return all(
        start < other + size_b and other < start + size_a
        for start, size_a, other, size_b in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )


def read_index(path: Path) -> Index:
    """The index of the checkpoint folder `path`, checked.

    Raises:
        UserError: If there is none, or it is broken, altered, incomplete, or from a later format.
    """
    file = path / INDEX
    try:
        raw = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no checkpoint at" if not path.exists() else f"no {INDEX}, so no checkpoint, in"
        hint = " It holds a .metadata file, a pickle of torch's own format, which is not read: loading one runs code."
        raise UserError(f"There is {what} {path}.{hint if (path / '.metadata').exists() else ''}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}). The checkpoint is broken; use another one.") from None
    index = _parse(raw, file)
    index.check(str(path))
    return index


def _parse(raw: Any, file: Path) -> Index:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{file} must have format {FORMAT}: got {got!r}. It was written by another version or program.")
    digest = raw.pop("digest", None)
    if digest != _digest(raw):
        raise UserError(f"{file} was altered after it was written: its digest does not fit. Use another checkpoint.")
    try:
        entries = {
            name: StoredTensor(
                _numbers(entry["shape"]),
                _TYPES[entry["dtype"]],
                tuple(
                    Chunk(_numbers(offsets), _numbers(sizes), _file(where), str(key), str(digest))
                    for offsets, sizes, where, key, digest in entry["chunks"]
                ),
            )
            for name, entry in raw["tensors"].items()
        }
        for name, entry in entries.items():
            if any(len(c.offsets) != len(entry.shape) or len(c.sizes) != len(entry.shape) for c in entry.chunks):
                raise ValueError(f"{name} has parts of another number of dimensions")
        plain = raw["plain"]
        return Index(entries, None if plain is None else (_file(plain[0]), str(plain[1])), int(raw["processes"]))
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is not a checkpoint's index ({error!r}).") from None


def _numbers(values: list[Any]) -> tuple[int, ...]:
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(f"sizes must be natural numbers: {values}")
    return tuple(values)


def _file(name: Any) -> str:
    """A file inside the checkpoint: an index cannot point anywhere else."""
    if not isinstance(name, str) or not _FILE.fullmatch(name) or ".." in name:
        raise ValueError(f"not a file of the checkpoint: {name!r}")
    return name


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
