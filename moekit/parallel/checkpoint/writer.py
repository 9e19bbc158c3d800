"""How torch.distributed.checkpoint's plans become files: safetensors for tensors, JSON for the index, no pickle.

DCP (torch.distributed.checkpoint) decides which rank writes which part of which tensor, and this writer what a file is.
Reading needs no plan: every rank copies what overlaps its shards. A checkpoint is a folder:

    index.json                              which part of which tensor lies where, with SHA-256 digests
    data-3f9a1c07/rank_00000.safetensors    what rank 0 wrote
    data-3f9a1c07/plain.pt                  what is not a tensor, read with weights_only=True

Everything is written to a hidden folder beside the checkpoint's place, flushed to disk and moved there at the end.
Where a checkpoint is to be replaced, its index is: until then it refers to the old data folder, then to the new one.

torch's `HuggingFaceStorageWriter` and `HuggingFaceStorageReader` are no base for this: they would supply the three
methods of this writer that do nothing, ten lines. They have no index, no digest and no atomic replace: with torch 2.13
an altered byte is loaded, a missing first shard leaves weights unfilled, a missing last one makes the tensor smaller,
and of two chunks of a tensor from one rank one is lost.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from moekit.atomic import flush, writing
from moekit.errors import UserError
from moekit.mapped import digest_of
from moekit.parallel.checkpoint.disk import commit, hidden_folders, is_file_checkpoint
from moekit.parallel.checkpoint.index import INDEX, Chunk, Index, StoredTensor

PLAIN = "plain.pt"


@dataclass(frozen=True)
class _Place:
    """What the coordinator tells a rank: the hidden folder, and the file in it that the rank writes."""

    folder: str
    file: str


class FolderWriter(StorageWriter):
    """Writes a checkpoint folder.

    Args:
        path: The folder of the checkpoint.
        plain: The bytes of what is no tensor; those of the coordinator are written.
    """

    def __init__(self, path: Path, plain: bytes) -> None:
        self.path, self.plain = path, plain
        self.folder: Path | None = None
        self.data = ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the hidden folder, and remove what killed processes have left.

        Raises:
            UserError: If a file is in the place, or it cannot be written to.
        """
        if not is_coordinator:
            return
        with writing(self.path):
            if self.path.exists() and not self.path.is_dir() and not is_file_checkpoint(self.path):
                raise UserError(f"a file is in the place of the checkpoint folder {self.path}. Move it away.")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for left_over in hidden_folders(self.path):
                shutil.rmtree(left_over, ignore_errors=True)
            token = secrets.token_hex(4)
            self.folder, self.data = self.path.with_name(f".{self.path.name}.{token}.tmp"), f"data-{token}"
            (self.folder / self.data).mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give every rank the folder and a name for its file."""
        return [
            replace(plan, storage_data=_Place(str(self.folder), f"{self.data}/rank_{rank:05d}.safetensors"))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        place: _Place = plan.storage_data
        tensors: dict[str, Tensor] = {}
        results = []
        for item in plan.items:
            found = planner.resolve_data(item)
            if isinstance(found, io.BytesIO) or item.tensor_data is None:
                raise TypeError(f"a checkpoint's state must hold tensors only: got something else at {item.index.fqn}.")
            tensor = found.detach().cpu().contiguous()
            # A view of something larger would take the larger thing along.
            tensor = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
            key = f"{item.index.fqn}@{','.join(map(str, item.tensor_data.chunk.offsets))}"
            tensors[key] = tensor
            chunk = Chunk(
                tuple(item.tensor_data.chunk.offsets),
                tuple(item.tensor_data.chunk.sizes),
                place.file,
                key,
                digest_of(tensor),
            )
            results.append(WriteResult(item.index, tensor.nbytes, chunk))
        if tensors:
            with writing(self.path):
                file = Path(place.folder) / place.file
                save_file(tensors, file)
                flush(file)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index and move everything into place: only the coordinator does."""
        assert self.folder is not None
        chunks: dict[str, list[Chunk]] = {}
        for written in results:
            for result in written:
                chunks.setdefault(result.index.fqn, []).append(result.storage_data)
        entries = {
            name: StoredTensor(tuple(found.size), found.properties.dtype, tuple(chunks.get(name, ())))
            for name, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        with writing(self.path):
            plain = f"{self.data}/{PLAIN}"
            (self.folder / plain).write_bytes(self.plain)
            flush(self.folder / plain)
            index = Index(entries, (plain, hashlib.sha256(self.plain).hexdigest()), len(results))
            index.check(str(self.path))
            (self.folder / INDEX).write_text(index.dump(), encoding="utf-8")
            for file in (self.folder / INDEX, self.folder / self.data, self.folder):
                flush(file)
            commit(self.folder, self.path, self.data)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True
