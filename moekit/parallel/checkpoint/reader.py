"""Reading a checkpoint folder: what its index lists, verified part by part."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
from moekit.mapped import MappedTensor, read_safetensors
from moekit.parallel.checkpoint.disk import digest_of
from moekit.parallel.checkpoint.index import Chunk, Index, read_index
from moekit.parallel.checkpoint.state import insert_dtensors


class StoredCheckpoint:
    """A checkpoint folder that is open for reading, in one process and without a model. Nothing in it is executed.

    Args:
        folder: The checkpoint, or the folder to which the files of `index` are relative.
        index: The index of the checkpoint; None = the one in the folder.

    Raises:
        UserError: If there is no checkpoint, or its index is broken, altered or incomplete. All methods raise it too,
            naming the file, if one is missing, cut short or altered.
    """

    def __init__(self, folder: str | os.PathLike[str], index: Index | None = None) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.index = read_index(self.folder) if index is None else index
        self._files: dict[str, dict[str, MappedTensor]] = {}
        self._verified: set[tuple[str, str]] = set()

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """Everything that is no tensor: ``state`` of model and optimizers, and ``extra``."""
        if self.index.plain is None:
            return {"state": {}, "extra": None}
        file = self.folder / self.index.plain[0]
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}). Use another checkpoint.") from None
        if hashlib.sha256(data).hexdigest() != self.index.plain[1]:
            raise UserError(f"{file} was altered after it was written. Use another checkpoint.")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected pickle protocol")  # refused below, in our words
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"the checkpoint {self.folder} must hold tensors and plain data only: "
                f"{next(iter(str(error).splitlines()), type(error).__name__)} Nothing in it has been executed."
            ) from None
        if not isinstance(content, dict) or not {"state", "extra"} <= set(content):
            raise UserError(f"the checkpoint {self.folder} holds other plain data than expected. Use another one.")
        return content

    @property
    def state(self) -> dict[str, Any]:
        """What is no tensor of model and optimizers: ``model``, ``shared`` (tensor names) and ``optimizers``."""
        return {"model": {}, "shared": {}, "optimizers": [], **self.plain["state"]}

    @property
    def extra(self) -> Any:
        """What was saved beside model and optimizers, its tensors included."""
        return insert_dtensors(self.plain["extra"], {f"extra/{n}": t for n, t in self.tensors("extra/").items()})

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Whole tensors, by name without `prefix`, of all whose names begin with it."""
        found = {}
        for name, entry in self.index.entries.items():
            if name.startswith(prefix):
                whole = found[name.removeprefix(prefix)] = torch.empty(entry.shape, dtype=entry.dtype)
                for chunk in entry.chunks:
                    if chunk.numel:
                        box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                        whole[box].copy_(self.part(chunk, (0,) * len(chunk.sizes), chunk.sizes))
        return found

    def weights(self) -> dict[str, Any]:
        """The model's state dict: shared tensors under each of their names, and what is no tensor."""
        found: dict[str, Any] = self.tensors("model/")
        found |= {name: found[first] for name, first in self.state["shared"].items() if first in found}
        return found | self.state["model"]

    def verify(self) -> None:
        """Read everything and compare every part with its digest."""
        for entry in self.index.entries.values():
            for chunk in entry.chunks:
                if chunk.numel:
                    self.part(chunk, (0,) * len(chunk.sizes), chunk.sizes)
        _ = self.plain

    def part(self, chunk: Chunk, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """A box of a chunk; when a chunk is first read, its digest is checked if it has one."""
        file = self.folder / chunk.file
        if chunk.file not in self._files:
            try:
                self._files[chunk.file] = read_safetensors(file, float8=True)
            except UserError as error:
                raise UserError(f"the checkpoint {self.folder} is broken: {error} Use another one.") from None
        stored = self._files[chunk.file].get(chunk.key)
        if stored is None:
            raise UserError(f"{file} has no tensor {chunk.key}. The checkpoint is broken; use another one.")
        whole = stored.tensor()
        if chunk.digest is not None and (chunk.file, chunk.key) not in self._verified:
            if stored.shape != chunk.sizes or digest_of(whole) != chunk.digest:
                raise UserError(
                    f"{file} was altered after it was written: {chunk.key} is not what was saved. Use another "
                    "checkpoint."
                )
            self._verified.add((chunk.file, chunk.key))
        for dimension, (start, size) in enumerate(zip(offsets, lengths, strict=True)):
            whole = whole.narrow(dimension, start, size)
        return whole


class FolderReader(StorageReader):
    """Gives DCP what a `StoredCheckpoint` holds.

    Args:
        stored: The checkpoint.
    """

    def __init__(self, stored: StoredCheckpoint) -> None:
        self.stored = stored

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in DCP's classes."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks],
                )
                for name, entry in self.stored.index.entries.items()
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
        for item in plan.items:
            part = self.stored.part(self._chunk(item.storage_index), item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part.view(target.shape))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _chunk(self, where: MetadataIndex) -> Chunk:
        offsets = tuple(where.offset or ())
        chunks = self.stored.index.entries[where.fqn].chunks
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
            TypeError: Always.
        """
        raise TypeError("a checkpoint holds no pickled objects among its tensors.")
