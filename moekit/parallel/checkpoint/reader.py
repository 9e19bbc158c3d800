"""Reading a checkpoint folder: what its index lists, verified part by part."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moekit.errors import UserError
from moekit.mapped import MappedTensor, digest_of, read_safetensors
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
        """Everything that is no tensor: ``state`` of model and optimizers, and ``extra``.

        Raises:
            UserError: If the file is missing, altered, or holds anything else.
        """
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

    @functools.cached_property
    def extra(self) -> Any:
        """What was saved beside model and optimizers, its tensors included."""
        return insert_dtensors(self.plain["extra"], {f"extra/{n}": t for n, t in self.tensors("extra/").items()})

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Whole tensors, by name without `prefix`, of all whose names begin with it."""
        found = {name: entry.empty() for name, entry in self.index.under(prefix).items()}
        self.fill({prefix + name: tensor for name, tensor in found.items()})
        return found

    @torch.no_grad()
    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy stored tensors into `targets`, by name; of a sharded one this rank's shard. Nothing is sent."""
        for name, target in targets.items():
            local, starts = target, [0] * target.ndim
            if isinstance(target, DTensor):
                local = target.to_local()
                starts = list(
                    compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)[1]
                )
            for chunk in self.index.entries[name].chunks:
                low = [max(start, offset) for start, offset in zip(starts, chunk.offsets, strict=True)]
                ends = zip(starts, local.shape, chunk.offsets, chunk.sizes, strict=True)
                high = [min(start + length, offset + size) for start, length, offset, size in ends]
                if chunk.numel and all(first < last for first, last in zip(low, high, strict=True)):
                    _box(local, low, high, starts).copy_(_box(self._read(chunk), low, high, chunk.offsets))

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
                    self._read(chunk)
        _ = self.plain

    def _read(self, chunk: Chunk) -> Tensor:
        """A chunk, mapped from its file; its digest, if it has one, is checked when it is first read."""
        file = self.folder / chunk.file
        if chunk.file not in self._files:
            try:
                self._files[chunk.file] = read_safetensors(file, float8=True, verify=False)
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
        return whole


def _box(tensor: Tensor, low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> Tensor:
    """The entries from `low` to before `high` of a tensor that begins at `origin`."""
    return tensor[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))]
