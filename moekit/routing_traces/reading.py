"""Reading a trace: forward by forward, each array compared with its digest before it is used."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.routing_traces.coding import PACKED, Array, decode, decode_tokens
from moekit.routing_traces.trace import TracedBatch, TracedLayer, TracedTokens, joined
from moekit.routing_traces.writing import INDEX, VERSION, comment, digest
from moekit.stored import parse_json

_FAULTS = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, TypeError, KeyError, IndexError,
    AttributeError, OverflowError, RuntimeError, NotImplementedError, StopIteration, MemoryError,
)  # fmt: skip
"""What Python and NumPy raise of an archive that is not as it was written."""

PROCESSES = "processes"
"""The note that says how many processes have a file each of a step."""


class _File:
    """One file of a trace: its index, and one part of its arrays at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise UserError(f"there is no routing trace {path}.")
        try:
            with zipfile.ZipFile(path) as archive:
                if not archive.comment.startswith(b"moekit routing trace "):
                    raise ValueError("it is another archive")
                version = archive.comment.split()[3].decode("ascii")
                if version != str(VERSION):
                    raise UserError(
                        f"{path} is a routing trace of version {version}: this moekit reads version {VERSION}. Use "
                        "the moekit that wrote it."
                    )
                content = archive.read(INDEX)
            if archive.comment != comment(content):
                raise ValueError("its index was altered after it was written")
            index = parse_json(content)
            self.notes = {str(name): str(text) for name, text in index["notes"].items()}
            self.batches: list[Mapping[str, Any]] = index["batches"]
            self.parts: list[Mapping[str, Any]] = index["parts"]
            self.said = [_said(batch) for batch in self.batches]
        except UserError:
            raise
        except _FAULTS as error:
            raise self._refused(error) from None
        self._number = -1
        self._arrays: dict[str, Array] = {}
        self._places: list[dict[str, int]] = []

    def _refused(self, error: BaseException, part: str = "") -> UserError:
        where = f" in {part}" if part else ""
        return UserError(f"{self.path} must be a whole routing trace: it is damaged{where} ({error}). Record it again.")

    def verify(self) -> None:
        """Read every part."""
        for number in range(len(self.parts)):
            self._open(number)

    def batch(self, number: int) -> TracedBatch:
        """A forward of the file."""
        try:
            part = next(n for n, part in enumerate(self.parts) if part["begin"] <= number < part["end"])
            self._open(part)
            places = dict(self._places[number - self.parts[part]["begin"]])
            return self._decoded(self.batches[number], places)
        except UserError:
            raise
        except _FAULTS as error:
            raise self._refused(error, f"forward {number}") from None

    def _decoded(self, said: Mapping[str, Any], places: dict[str, int]) -> TracedBatch:
        def taker(owner: str) -> Any:
            def take(name: str, count: int) -> Array:
                key = f"{owner}/{name}"
                start = places.get(key, 0)
                found = self._arrays[key][start : start + count]
                if len(found) != count:
                    raise ValueError(f"{key} is too short")
                return found

            return take

        streams = [decode_tokens(about, taker(str(number))) for number, about in enumerate(said["tokens"])]
        layers = {name: decode(about, streams[about["tokens"]], taker(name)) for name, about in said["layers"].items()}
        gradients = {name: _tensor(values) for name, values in said["gradients"].items()}
        return TracedBatch(int(said["step"]), str(said["task"]), bool(said["training"]), layers, gradients)

    def _open(self, number: int) -> None:
        """Have the arrays of a part in memory, and where each of its forwards begins in them."""
        if number == self._number:
            return
        part, name = self.parts[number], ""
        try:
            arrays: dict[str, Array] = {}
            with zipfile.ZipFile(self.path) as archive:
                for name, known in part["digests"].items():
                    content = archive.read(f"{number}/{name}.npy")
                    array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
                    if digest(array) != known:
                        raise ValueError("it is not what was written")
                    arrays[name] = array
            name = ""
            self._arrays, self._places, self._number = arrays, self._starts(part), number
        except _FAULTS as error:
            raise self._refused(error, f"{number}/{name}" if name else f"part {number}") from None

    def _starts(self, part: Mapping[str, Any]) -> list[dict[str, int]]:
        found: list[dict[str, int]] = []
        here: dict[str, int] = defaultdict(int)
        for said in self.batches[part["begin"] : part["end"]]:
            found.append(dict(here))
            parts = [*said["layers"].items(), *((str(n), about) for n, about in enumerate(said["tokens"]))]
            for owner, about in parts:
                for name in about["has"]:
                    n = int(about["n"])
                    here[f"{owner}/{name}"] += -(-n // 8) if name in PACKED else n
        return found


class RoutingTrace:
    """A trace that can be read again and again: ``for batch in trace``, ``trace[3]``.

    A folder holds a file for every recorded step. The forwards of several processes are joined, in the order of their
    ranks, where all of them made as many; else each stands by itself. One part of a file is in memory at a time.

    Attributes:
        layers: number of experts by name of each sparse layer.
        notes: what was noted when it was made; of a folder in its first file.
        steps: optimizer steps that were done before each forward.
        tasks: the task of each.
    """

    def __init__(self, files: Sequence[Sequence[_File]]) -> None:
        self._files = files
        self.notes = files[0][0].notes
        self._where = [(group, number) for group in files for number in range(len(group[0].batches))]
        said = [group[0].said[number] for group, number in self._where]
        self.steps = [step for step, _, _ in said]
        self.tasks = [task for _, task, _ in said]
        self.layers: dict[str, int] = {}
        for _, _, layers in said:
            for name, experts in layers.items():
                if self.layers.setdefault(name, experts) != experts:
                    raise UserError(f"{files[0][0].path}: {name} must have one number of experts in the whole trace.")

    def __len__(self) -> int:
        """Forwards."""
        return len(self._where)

    def __getitem__(self, number: int) -> TracedBatch:
        """A forward, from 0.

        Raises:
            IndexError: there is none.
            UserError: the file is damaged there.
        """
        group, inside = self._where[number]
        found = [file.batch(inside) for file in group]
        return found[0] if len(found) == 1 else _joined(found)

    def __iter__(self) -> Iterator[TracedBatch]:
        return (self[number] for number in range(len(self)))

    def forwards_of(self, layer: str) -> list[int]:
        """The forwards in which a layer took part."""
        return [n for n, (group, inside) in enumerate(self._where) if layer in group[0].batches[inside]["layers"]]


def read_trace(path: str | Path, *, verify: bool = True) -> RoutingTrace:
    """Open a trace.

    Args:
        path: a file that `record` wrote, or the folder of a `moekit.training.callbacks.routing_recorder`.
        verify: whether all of it is read now and compared with its digests; else each part when it is used.

    Raises:
        UserError: there is none, it is damaged, of a later version, or the file of a process is missing.
    """
    place = Path(path)
    names = sorted(place.glob("[!.]*.npz")) if place.is_dir() else [place]
    if not names:
        raise UserError(f"the folder {place} must hold routing traces: there is no .npz file in it.")
    groups: dict[str, list[_File]] = {}
    for name in names:
        groups.setdefault(name.name.partition(".")[0] if place.is_dir() else "", []).append(_File(name))
    for key, files in groups.items():
        told = files[0].notes.get(PROCESSES, "1")
        if not told.isdecimal():
            raise UserError(f"{files[0].path}: the note {PROCESSES!r} must be the number of processes: got {told!r}.")
        whole = int(told)
        if len(files) != whole:
            raise UserError(
                f"{place}: the trace of step {key} must have a file of each of {whole} processes: got {len(files)}."
            )
        if verify:
            for file in files:
                file.verify()
    whole_groups: list[list[_File]] = []
    for files in groups.values():
        equal = len({len(file.batches) for file in files}) == 1
        whole_groups += [files] if equal else [[file] for file in files]
    return RoutingTrace(whole_groups)


def _said(batch: Mapping[str, Any]) -> tuple[int, str, dict[str, int]]:
    """Step, task, and numbers of experts by layer of a forward, as the index has them."""
    layers = {str(name): int(about["experts"]) for name, about in batch["layers"].items()}
    return int(batch["step"]), str(batch["task"]), layers


def _joined(batches: Sequence[TracedBatch]) -> TracedBatch:
    first = batches[0]
    if any(batch.layers.keys() != first.layers.keys() for batch in batches):
        told = [", ".join(batch.layers) for batch in batches]
        raise UserError(f"processes must have recorded the same layers in a forward: got {told} at step {first.step}.")
    layers = {
        name: TracedLayer(
            joined([batch.layers[name].routing for batch in batches]),
            _joined_tokens([batch.layers[name].tokens for batch in batches]),
            all(batch.layers[name].weighed for batch in batches),
        )
        for name in first.layers
    }
    return TracedBatch(first.step, first.task, first.training, layers, first.gradients)


def _joined_tokens(parts: Sequence[TracedTokens]) -> TracedTokens:
    def whole(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else torch.cat(values)

    masks = [torch.ones(p.num_tokens, dtype=torch.bool) if p.mask is None else p.mask for p in parts]
    sequence: list[Tensor] = []
    start = 0
    for part in parts:
        if part.sequence is None:
            sequence = []
            break
        sequence.append(part.sequence + start)
        start += int(part.sequence.max()) + 1 if part.sequence.numel() else 0
    return TracedTokens(
        sum(part.num_tokens for part in parts),
        None if all(part.mask is None for part in parts) else torch.cat(masks),
        whole("ids"),
        whole("language"),
        whole("place"),
        torch.cat(sequence) if sequence else None,
    )


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
