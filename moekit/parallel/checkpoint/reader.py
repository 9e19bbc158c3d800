"""Reading a checkpoint's files: what an index lists, verified part by part."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from moekit.errors import UserError
from moekit.parallel.checkpoint.disk import digest_of
from moekit.parallel.checkpoint.index import Chunk, Index


class FolderReader(StorageReader):
    """Reads what an `Index` lists, and checks the digest of every part that it reads.

    Args:
        folder: what the index's files are relative to.
        index: of the checkpoint.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in DCP's words."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks],
                )
                for name, entry in self.index.entries.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Read file after file."""
        plan.items.sort(key=lambda item: self._chunk(item.storage_index).file)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every part into its place."""
        with contextlib.ExitStack() as stack:
            name, file = "", None
            checked: set[tuple[str, str]] = set()
            for item in plan.items:
                chunk = self._chunk(item.storage_index)
                if chunk.file != name:
                    stack.close()
                    name, file = chunk.file, stack.enter_context(_opened(self.folder / chunk.file))
                part = read_part(file, chunk, item.storage_offsets, item.lengths, self.folder, checked)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part.view(target.shape))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _chunk(self, where: MetadataIndex) -> Chunk:
        offsets = tuple(where.offset or ())
        chunks = self.index.entries[where.fqn].chunks
        hint = where.index
        if hint is not None and hint < len(chunks) and chunks[hint].offsets == offsets and chunks[hint].numel:
            return chunks[hint]
        return next(chunk for chunk in chunks if chunk.offsets == offsets and (chunk.numel or not chunk.sizes))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


class TensorLoadPlanner(DefaultLoadPlanner):
    """DCP's planner without its way to unpickle: this format has nothing for it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Refuse.

        Raises:
            TypeError: always.
        """
        raise TypeError("a checkpoint holds no pickled objects among its tensors.")


def read_part(
    file: Any, chunk: Chunk, offsets: Any, lengths: Any, folder: Path, checked: set[tuple[str, str]]
) -> Tensor:
    """Part of a chunk from an opened safetensors file; the whole chunk's digest is checked once.

    Raises:
        UserError: naming the file, if the part is not there or not what was written.
    """
    try:
        if chunk.digest is None:
            box = tuple(slice(start, start + size) for start, size in zip(offsets, lengths, strict=True))
            found: Tensor = file.get_slice(chunk.key)[box] if box else file.get_tensor(chunk.key)
            return found
        whole: Tensor = file.get_tensor(chunk.key)
    except SafetensorError as error:
        raise UserError(f"{folder / chunk.file} cannot be read at {chunk.key} ({error}). It is broken.") from None
    if (chunk.file, chunk.key) not in checked:
        if tuple(whole.shape) != chunk.sizes or digest_of(whole) != chunk.digest:
            raise UserError(
                f"{folder / chunk.file} was altered after it was written: {chunk.key} is not what was saved. Use "
                "another checkpoint."
            )
        checked.add((chunk.file, chunk.key))
    for dimension, (start, size) in enumerate(zip(offsets, lengths, strict=True)):
        whole = whole.narrow(dimension, start, size)
    return whole


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An opened safetensors file.

    Raises:
        UserError: naming it, if it is missing or broken.
    """
    try:
        opened = safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file} is missing. The checkpoint is broken; use another one.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} cannot be read ({error}). It is cut short or broken; use another checkpoint."
        ) from None
    with opened as inside:
        yield inside


def read_plain(folder: Path, index: Index) -> bytes | None:
    """The bytes of plain data, or None.

    Raises:
        UserError: if they are not what was written.
    """
    if index.plain is None:
        return None
    file = folder / index.plain[0]
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). Use another checkpoint.") from None
    if hashlib.sha256(data).hexdigest() != index.plain[1]:
        raise UserError(f"{file} was altered after it was written. Use another checkpoint.")
    return data


def verify(folder: Path, index: Index) -> None:
    """Read every part of every tensor, and plain data, and check their digests.

    Raises:
        UserError: naming the file that is missing, cut short or altered.
    """
    by_file: dict[str, list[Chunk]] = {}
    for entry in index.entries.values():
        for chunk in entry.chunks:
            if chunk.numel:
                by_file.setdefault(chunk.file, []).append(chunk)
    for name, chunks in sorted(by_file.items()):
        with _opened(folder / name) as file:
            for chunk in chunks:
                read_part(file, chunk, (0,) * len(chunk.sizes), chunk.sizes, folder, set())
    read_plain(folder, index)


def tensors_of(folder: Path, index: Index, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one after the other, as ``(new name, tensor)``.

    Args:
        folder: of the checkpoint.
        index: its index.
        names: which, and the names that they get.

    Raises:
        UserError: if a part is missing or altered.
    """
    for name, new in names.items():
        entry = index.entries[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for chunk in entry.chunks:
            if chunk.numel:
                with _opened(folder / chunk.file) as file:
                    part = read_part(file, chunk, (0,) * len(chunk.sizes), chunk.sizes, folder, set())
                box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                whole[box].copy_(part)
        yield new, whole
