"""Tensors that stay in their files: mapped into memory when they are asked for, read by the page when they are used.

safetensors has no checksums. Files that moekit writes hold digests among the notes of their headers, where other
programs do not mind them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.stored import parse_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Types of safetensors files by the names that their headers give them."""

_DIGESTS, _HEADER = "moekit_digests", "moekit_header"  # notes: SHA-256 of each tensor, and of all that a header says


@dataclass(frozen=True)
class MappedTensor:
    """Where a tensor lies in a file.

    Attributes:
        path: The file.
        offset: The place of its first element, in bytes.
        shape: Its shape.
        stride: The steps from entry to entry of each dimension, in elements.
        dtype: The type of its elements.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: int) -> MappedTensor:
        """Entry `index` of the first dimension."""
        if not -self.shape[0] <= index < self.shape[0]:
            raise IndexError(f"index {index} is out of range for {self.shape[0]} entries.")
        start = self.offset + (index % self.shape[0]) * self.stride[0] * self.dtype.itemsize
        return dataclasses.replace(self, offset=start, shape=self.shape[1:], stride=self.stride[1:])

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def tensor(self) -> Tensor:
        """The tensor, mapped: no byte is read before it is used, and the map goes when the tensor does.

        What is written into it stays in memory and never reaches the file.
        """
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        size = (last + 1) * self.dtype.itemsize
        raw: np.ndarray[Any, Any] = np.memmap(self.path, np.uint8, mode="c", offset=self.offset, shape=(size,))
        if raw.ctypes.data % self.dtype.itemsize:
            raw = np.array(raw)  # a file may begin with an odd number of bytes
        return torch.from_numpy(raw).view(self.dtype).as_strided(self.shape, self.stride)


_STORED = "stored_weights"


class StoredWeights(ABC):
    """Where the weights of a module on the meta device lie, until they are needed.

    Who divides such a model gives it memory, divides it, and then has it filled, each rank its part. What is added to
    the module later, as adapters are, is drawn as ever.
    """

    def mark(self, module: nn.Module) -> None:
        """Say of a module, and of all that are in it now, that their weights are here."""
        for inner in module.modules():
            inner.__dict__[_STORED] = self if inner is module else None

    @staticmethod
    def roots(model: nn.Module) -> list[tuple[nn.Module, StoredWeights]]:
        """The modules of a model that were marked, each with where its weights are."""
        found = ((module, module.__dict__.get(_STORED)) for module in model.modules())
        return [(module, stored) for module, stored in found if stored is not None]

    @staticmethod
    def has(module: nn.Module) -> bool:
        """Whether the tensors that a module holds itself are stored, and not yet read."""
        return _STORED in module.__dict__

    def fill(self, module: nn.Module) -> None:
        """`fill_module`, after which nothing is marked."""
        self.fill_module(module)
        for inner in module.modules():
            inner.__dict__.pop(_STORED, None)

    @abstractmethod
    def fill_module(self, module: nn.Module) -> None:
        """Read the module's weights, of divided ones this rank's part. All ranks call it together."""


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write CPU tensors with digests, by which `read_safetensors` knows damage.

    Args:
        tensors: The tensors by name; none shares memory with another.
        path: A draft that its caller moves into place: see `moekit.atomic.replacing_path`.
        notes: Text entries of the header.
    """
    notes = {"format": "pt", **(notes or {}), _DIGESTS: json.dumps({n: digest_of(t) for n, t in tensors.items()})}
    types = {dtype: name for name, dtype in DTYPES.items()}
    entries = {
        name: [types.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape)] for name, tensor in tensors.items()
    }
    save_file(dict(tensors), path, metadata={**notes, _HEADER: _header_digest(entries, notes)})


def read_safetensors(path: Path | str, *, float8: bool = False, verify: bool = True) -> dict[str, MappedTensor]:
    """The tensors of a safetensors file by name.

    Args:
        path: The file.
        float8: Whether tensors of float8 types, which can be stored but not computed with, are accepted.
        verify: Whether every tensor is read now and compared with its digest, where the file has digests: those of
            `write_safetensors` have, those of other programs have not. Else nothing but the header is read.

    Raises:
        UserError: If there is no such file, it is cut off, broken or altered, or a tensor has another type.
    """
    tensors, notes = _read_header(Path(path), float8)
    for name, digest in digests_in(notes).items() if verify else ():
        if digest_of(tensors[name].tensor()) != digest:
            raise UserError(f"{path} was altered after it was written: {name} is not what was saved.")
    return tensors


def digests_in(notes: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes by its name, of the notes of a file; none where another program wrote it."""
    found: dict[str, str] = parse_json(notes.get(_DIGESTS, "{}"))
    return found


def read_notes(path: Path | str) -> dict[str, str]:
    """The text entries that the header of a safetensors file holds beside its tensors.

    Raises:
        UserError: If there is no such file, or it is cut off or broken.
    """
    return _read_header(Path(path), True)[1]


def _read_header(path: Path, float8: bool) -> tuple[dict[str, MappedTensor], dict[str, str]]:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = parse_json(file.read(length))
        notes = header.pop("__metadata__", {})
        if _HEADER in notes or _DIGESTS in notes:
            entries = {name: [entry["dtype"], entry["shape"]] for name, entry in header.items()}
            said = {name: text for name, text in notes.items() if name != _HEADER}
            if notes.get(_HEADER) != _header_digest(entries, said) or set(digests_in(notes)) != set(header):
                raise ValueError("its header was altered after it was written")
        known = {name: dtype for name, dtype in DTYPES.items() if float8 or not name.startswith("F8")}
        return {name: _entry(path, name, entry, 8 + length, size, known) for name, entry in header.items()}, notes
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} must be a whole safetensors file: {error}.") from None


def _header_digest(entries: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([entries, notes], sort_keys=True).encode()).hexdigest()


def _entry(
    path: Path, name: str, entry: Mapping[str, Any], data: int, size: int, known: Mapping[str, torch.dtype]
) -> MappedTensor:
    """One tensor of a header, whose data begin at byte `data`."""
    if entry["dtype"] not in known:
        raise UserError(f"{path}: {name} has the type {entry['dtype']}; known are {', '.join(known)}.")
    dtype, shape = known[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    start, end = (int(n) for n in entry["data_offsets"])
    if min((*shape, start), default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize or data + end > size:
        raise ValueError(f"{name} of shape {list(shape)} cannot lie in bytes {start} to {end} of {size - data}")
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return MappedTensor(path, data + start, shape, stride, dtype)


def map_fake(path: Path | str, tensors: Mapping[str, Tensor]) -> dict[str, MappedTensor]:
    """Places of tensors that ``torch.load`` gave under a `FakeTensorMode`, which notes where they lie in the file.

    Raises:
        ValueError: if a tensor was not loaded so.
    """
    found = {}
    for name, tensor in tensors.items():
        start = tensor.untyped_storage()._checkpoint_offset
        if start is None:
            raise ValueError(f"{name} was not loaded from a file under a FakeTensorMode.")
        offset = int(start) + int(tensor.storage_offset()) * tensor.dtype.itemsize
        found[name] = MappedTensor(Path(path), offset, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
    return found
