"""A model's weights as one safetensors file, which any program reads, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from moekit.atomic import followed, replacing_path
from moekit.errors import UserError
from moekit.mapped import digests_in, read_notes, read_safetensors, write_safetensors
from moekit.parallel.checkpoint.checkpointer import PathLike, read_into
from moekit.parallel.checkpoint.index import Chunk, Index, StoredTensor
from moekit.parallel.checkpoint.reader import StoredCheckpoint
from moekit.parallel.checkpoint.state import model_targets, model_tensors, require_same_tensors, state_dict_from
from moekit.parallel.shards import full_tensor
from moekit.stored import parse_json

_SHARED = "moekit_shared"  # in a file's metadata: further names of shared tensors, as JSON


def export_safetensors(model: nn.Module, path: PathLike) -> None:
    """Write the whole model's weights and buffers to one file, gathered from all ranks; rank 0 writes.

    All processes call it together. Rank 0 holds the whole model in host memory while it writes. A shared tensor is
    written under each of its names, so that `load_state_dict` takes the file.

    Args:
        model: The model, parallelized or plain.
        path: The file; one that is there is replaced when the new one is whole.

    Raises:
        UserError: If rank 0 cannot write; on rank 0.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    whole: dict[str, Tensor] = {}
    tensors, _, shared = model_tensors(model)
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if writes:
            whole[name] = full.detach().cpu().contiguous().clone()
    if writes:
        _write(whole, shared, Path(os.path.abspath(path)))


def consolidate(checkpoint: PathLike, path: PathLike) -> None:
    """Turn a sharded checkpoint's model into the file of `export_safetensors`, in one process, without the model.

    Raises:
        UserError: If the checkpoint is incomplete, cut short or altered, or the file cannot be written.
    """
    stored = StoredCheckpoint(checkpoint)
    _write(stored.tensors("model/"), stored.state["shared"], Path(os.path.abspath(path)))


def import_safetensors(path: PathLike, model: nn.Module) -> None:
    """Load a file that `export_safetensors` or `consolidate` wrote into a model; each rank reads its own part.

    Args:
        path: The file, where all processes see it.
        model: The model, parallelized in any way or plain.

    Raises:
        UserError: If the file is missing, cut short, or of another model; the model is as it was then.
    """
    file = Path(os.path.abspath(path))
    index, shared = _index_of(file)
    plain = {"shared": shared}
    require_same_tensors(model, index, plain, str(file))
    targets = model_targets(model, index)
    read_into(targets, StoredCheckpoint(file.parent, index))
    model.load_state_dict(state_dict_from(model, targets, plain), strict=False)  # names of tensors are compared


def _write(tensors: Mapping[str, Tensor], shared: Mapping[str, str], path: Path) -> None:
    copies = {name: tensors[first].clone() for name, first in shared.items() if first in tensors}
    with replacing_path(followed(path)) as temporary:
        write_safetensors({**tensors, **copies}, temporary, {_SHARED: json.dumps(dict(shared))})


def _index_of(file: Path) -> tuple[Index, dict[str, str]]:
    """The header of a safetensors file as an index of one chunk for each tensor, and further names of shared ones."""
    tensors, notes = read_safetensors(file, float8=True, verify=False), read_notes(file)
    digests = digests_in(notes)
    try:
        shared = dict(parse_json(notes.get(_SHARED, "{}")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} must say which tensors are shared: {error}. Use another file.") from None
    entries = {
        f"model/{name}": StoredTensor(
            stored.shape,
            stored.dtype,
            (Chunk((0,) * len(stored.shape), stored.shape, file.name, name, digests.get(name)),),
        )
        for name, stored in tensors.items()
        if name not in shared
    }
    return Index(entries), shared
