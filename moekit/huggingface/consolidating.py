"""`consolidate_folder`: a sharded checkpoint of an adopted model as a folder of transformers."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from moekit.atomic import replacing_folder, writing
from moekit.errors import UserError
from moekit.huggingface.adopt import adopt
from moekit.huggingface.card import write_card
from moekit.huggingface.folder import compute_buffers, copy_beside, folder_files, give_memory, on_meta
from moekit.parallel.checkpoint.checkpointer import PathLike
from moekit.parallel.checkpoint.reader import StoredCheckpoint
from moekit.parallel.checkpoint.state import model_tensors


def consolidate_folder(checkpoint: PathLike, like: PathLike, out: PathLike) -> None:
    """Make a folder of transformers of a sharded checkpoint, in one process, whatever the layout it was trained in.

    Args:
        checkpoint: a folder that `ExpertParallelStrategy` or `moekit.parallel.Checkpointer` wrote.
        like: the folder of `adopt_folder` that training began with; its tokenizer goes along, and its type of weights
            stays.
        out: a new or empty folder.

    Raises:
        UserError: the checkpoint is broken or of another model, or `out` holds something.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} must be a new or empty folder. Choose another.")
    stored = StoredCheckpoint(checkpoint)
    place = Path(os.path.abspath(like))
    folder_files(place)
    model = on_meta(place, None)
    adopt(model, aux=None)
    compute_buffers(model)
    give_memory(model, torch.device("cpu"))
    wanted, _, _ = model_tensors(model)
    first = next(iter(wanted))
    entries = stored.index.under("model/")
    prefixes = [name.removesuffix(first) for name in entries if name == first or name.endswith(f".{first}")]
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    for prefix in prefixes:
        found = {n: entries[prefix + n].shape for n in wanted if prefix + n in entries}
        if found == shapes:
            stored.fill({f"model/{prefix}{name}": tensor for name, tensor in wanted.items()})
            with writing(target), replacing_folder(target) as draft:
                model.save_pretrained(draft)
                copy_beside(place, draft)
                trained = [f"Trained with moekit from {place.name}."]
                write_card(draft, name=target.absolute().name, base=place, relation="finetune", changes=trained)
            return
    raise UserError(
        f"the checkpoint {stored.folder} must hold the tensors of {place}, an adopted {type(model).__name__}: it does "
        "not, or not in these shapes. Name the folder that training began with, and merge adapters first."
    )
