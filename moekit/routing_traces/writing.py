"""Writing a trace: a zip archive of NumPy arrays in parts, and an index with a digest of each.

``numpy.load(file)`` opens it, without pickles. The arrays of a part hold several forwards behind each other; the index
says how many entries belong to which. Its own digest, and the version, are the comment of the archive.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from moekit.atomic import replacing
from moekit.errors import UserError
from moekit.routing_traces.coding import Array, encode, encode_tokens
from moekit.routing_traces.trace import TracedBatch, TracedTokens

VERSION = 1
INDEX = "index.json"
_PART_BYTES = 1 << 22


def comment(index: bytes) -> bytes:
    """The comment of an archive with this index."""
    return f"moekit routing trace {VERSION} {hashlib.sha256(index).hexdigest()}".encode()


def digest(array: Array) -> str:
    """SHA-256 of the type and the bytes of an array."""
    return hashlib.sha256(array.dtype.str.encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


class TraceWriter:
    """Writes a trace: ``with TraceWriter(path) as writer: writer.add(batch)``.

    The file has its name when all is written, and never before; after an exception there is none. What is kept in
    memory is one part, and of each forward some numbers for the index.

    Args:
        path: the file, which ends in ``.npz`` by custom.
        notes: text to be read again, by name.
        part_bytes: bytes of arrays, before they are packed, after which a part is written.

    Raises:
        UserError: it cannot be written, or a note is no text.
    """

    def __init__(
        self, path: str | Path, notes: Mapping[str, str] | None = None, *, part_bytes: int = _PART_BYTES
    ) -> None:
        self.path, self.notes, self._part_bytes = Path(path), dict(notes or {}), part_bytes
        if wrong := [name for name, value in self.notes.items() if not isinstance(value, str)]:
            raise UserError(
                f"notes of a routing trace must be text: {wrong[0]} is a {type(self.notes[wrong[0]]).__name__}. Write "
                "str(...) around it."
            )
        self._batches: list[dict[str, Any]] = []
        self._parts: list[dict[str, Any]] = []
        self._waiting: dict[str, list[Array]] = {}
        self._bytes = 0
        self._stack = contextlib.ExitStack()
        self._archive: zipfile.ZipFile | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(replacing(self.path))
            self._archive = stack.enter_context(zipfile.ZipFile(file, "w"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._stack:  # which takes the draft away where finishing fails
                self._finish()
        else:
            self._stack.__exit__(kind, error, trace)

    def __len__(self) -> int:
        """Forwards that were added."""
        return len(self._batches)

    def add(self, batch: TracedBatch) -> None:
        """Add a forward."""
        streams: list[TracedTokens] = []
        said: dict[str, Any] = {"step": batch.step, "task": batch.task, "training": batch.training, "layers": {}}
        for name, layer in batch.layers.items():
            place = next((n for n, tokens in enumerate(streams) if tokens.same(layer.tokens)), len(streams))
            if place == len(streams):
                streams.append(layer.tokens)
            about, arrays = encode(layer)
            said["layers"][name] = {"tokens": place, **about}
            self._wait(name, arrays)
        said["tokens"] = []
        for number, tokens in enumerate(streams):
            about, arrays = encode_tokens(tokens)
            said["tokens"].append(about)
            self._wait(str(number), arrays)
        said["gradients"] = {name: values.to(torch.float32).tolist() for name, values in batch.gradients.items()}
        self._batches.append(said)
        if self._bytes >= self._part_bytes:
            self._write_part()

    def _wait(self, owner: str, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            self._waiting.setdefault(f"{owner}/{name}", []).append(array)
            self._bytes += array.nbytes

    def _write_part(self) -> None:
        number, begun = len(self._parts), self._parts[-1]["end"] if self._parts else 0
        digests = {}
        for name, arrays in self._waiting.items():
            whole = np.concatenate(arrays)  # of types that differ, one that holds all
            digests[name] = digest(whole)
            self._put(f"{number}/{name}.npy", _npy(whole), packed=whole.dtype.kind != "f")
        self._parts.append({"begin": begun, "end": len(self._batches), "digests": digests})
        self._waiting, self._bytes = {}, 0

    def _put(self, name: str, content: bytes, *, packed: bool) -> None:
        assert self._archive is not None, "a TraceWriter is used in a with statement"
        entry = zipfile.ZipInfo(name)  # of 1980: the same routing gives the same bytes
        entry.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        self._archive.writestr(entry, content, compresslevel=1 if packed else None)

    def _finish(self) -> None:
        self._write_part()
        index = {"version": VERSION, "notes": self.notes, "batches": self._batches, "parts": self._parts}
        content = json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._put(INDEX, content, packed=True)
        assert self._archive is not None
        self._archive.comment = comment(content)


def _npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()
