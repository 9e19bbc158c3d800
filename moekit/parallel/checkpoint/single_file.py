"""A model's weights as one safetensors file, which any program reads, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moekit.atomic import replacing_path
from moekit.errors import UserError
from moekit.parallel.checkpoint.checkpointer import PathLike, read_into, read_state
from moekit.parallel.checkpoint.index import Chunk, Entry, Index, read_index
from moekit.parallel.checkpoint.layout import gathered
from moekit.parallel.checkpoint.reader import tensors_of
from moekit.parallel.checkpoint.state import model_targets, model_tensors, require_same_tensors, state_dict_from

_SHARED = "moekit_shared"  # in a file's metadata: further names of shared tensors, as JSON
_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def export_safetensors(model: nn.Module, path: PathLike) -> None:
    """Write the whole model's weights and buffers to one file, gathered from all ranks; rank 0 writes.

    All processes call it together. Rank 0 holds the whole model in host memory while it writes. A shared tensor is
    written under each of its names, so that `load_state_dict` takes the file.

    Args:
        model: parallelized or plain.
        path: the file; one that is there is replaced when the new one is whole.

    Raises:
        UserError: if rank 0 cannot write; on rank 0.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    whole: dict[str, Tensor] = {}
    tensors, _, shared = model_tensors(model)
    for name, tensor in tensors.items():
        full = gathered(tensor)
        if writes:
            whole[name.partition("/")[2]] = full.detach().cpu().contiguous().clone()
    if writes:
        _write(whole, shared, Path(os.path.abspath(path)))


def consolidate(checkpoint: PathLike, path: PathLike) -> None:
    """Turn a sharded checkpoint's model into one safetensors file, in one process, without building the model.

    A shared tensor is written under each of its names, so that `load_state_dict` takes the file.

    Args:
        checkpoint: the folder.
        path: the file.

    Raises:
        UserError: if the checkpoint is incomplete, cut short or altered, or the file cannot be written.
    """
    folder = Path(os.path.abspath(checkpoint))
    index = read_index(folder)
    names = {name: name.partition("/")[2] for name in index.entries if name.startswith("model/")}
    _write(dict(tensors_of(folder, index, names)), read_state(folder, index)["shared"], Path(os.path.abspath(path)))


def import_safetensors(path: PathLike, model: nn.Module) -> None:
    """Load a file that `export_safetensors` or `consolidate` wrote into a model; each rank reads its own part.

    Args:
        path: the file, where all processes see it.
        model: parallelized in any way, or plain.

    Raises:
        UserError: if the file is missing, cut short, or of another model; the model is as it was then.
    """
    file = Path(os.path.abspath(path))
    index, shared = _index_of(file)
    plain = {"shared": shared}
    require_same_tensors(model, index, plain, str(file))
    targets = model_targets(model, index)
    read_into(targets, file.parent, index)
    model.load_state_dict(state_dict_from(model, targets, plain), strict=False)  # names of tensors are compared


def _write(tensors: Mapping[str, Tensor], shared: Mapping[str, str], path: Path) -> None:
    copies = {name: tensors[first].clone() for name, first in shared.items() if first in tensors}
    with replacing_path(path) as temporary:
        save_file({**tensors, **copies}, temporary, metadata={"format": "pt", _SHARED: json.dumps(dict(shared))})


def _index_of(file: Path) -> tuple[Index, dict[str, str]]:
    """The header of a safetensors file as an index of one chunk for each tensor, and further names of shared ones."""
    try:
        with safe_open(file, framework="pt") as opened:
            entries = {}
            shared: dict[str, str] = json.loads((opened.metadata() or {}).get(_SHARED, "{}"))
            for name in set(opened.keys()) - set(shared):
                piece = opened.get_slice(name)
                shape = tuple(piece.get_shape())
                chunk = Chunk((0,) * len(shape), shape, file.name, name, None)
                entries[f"model/{name}"] = Entry(shape, _NAMES[piece.get_dtype()], (chunk,))
    except FileNotFoundError:
        raise UserError(f"There is no file {file}.") from None
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}). It is cut short, or no safetensors file.") from None
    return Index(entries), shared
