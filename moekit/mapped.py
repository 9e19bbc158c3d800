"""Tensors that stay in their files: mapped into memory when they are asked for, read by the page when they are used."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Types of safetensors files by the names that their headers give them."""


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


def read_safetensors(path: Path | str, *, float8: bool = False) -> dict[str, MappedTensor]:
    """The tensors of a safetensors file by name; nothing but its header is read.

    Args:
        path: The file.
        float8: Whether tensors of float8 types, which can be stored but not computed with, are accepted.

    Raises:
        UserError: If there is no such file, it is cut off or broken, or a tensor has another type.
    """
    return _read_header(Path(path), float8)[0]


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
            header = json.loads(file.read(length))
        notes = header.pop("__metadata__", {})
        known = {name: dtype for name, dtype in DTYPES.items() if float8 or not name.startswith("F8")}
        return {name: _entry(path, name, entry, 8 + length, size, known) for name, entry in header.items()}, notes
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} must be a whole safetensors file: {error}.") from None


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
