"""A changed model as a folder that transformers opens, with what lay beside the folder that it is from, and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.atomic import replacing_folder, require_apart, write_text, writing
from moekit.errors import UserError
from moekit.huggingface.card import write_card
from moekit.huggingface.folder import copy_beside


def write_folder(model: Any, out: Path | str, *, like: Path | str, overwrite: bool = False, **card: Any) -> Path:
    """Write a model of transformers, whole or not at all: config.json, safetensors, the tokenizer's files, a card.

    Code of the folder that it is from is left behind, and so is what names it (``auto_map``).

    Args:
        model: a model of any class of transformers, adopted or not.
        out: a path that does not exist, an empty folder, or with `overwrite` a folder of transformers.
        like: the folder that it was made of, whose tokenizer and other small files go along.
        overwrite: replace what is there.
        **card: what `write_card` takes.

    Raises:
        UserError: something is in the way, or cannot be written.
    """
    target = Path(out)
    require_free(target, like=like, overwrite=overwrite)
    with writing(target), replacing_folder(target) as draft:
        model.save_pretrained(draft)
        copy_beside(Path(like), draft)
        _name_no_code(draft)
        write_card(draft, **{"name": target.absolute().name, "base": like, **card})
    return target


def _name_no_code(folder: Path) -> None:
    """Leave out of a folder's JSON files what names classes in Python files, unless such files were written.

    The model is of transformers' own class, and code of the folder that it is from does not go along: who trusts code
    of folders (``trust_remote_code``) would look for it in vain.
    """
    if any(folder.glob("*.py")):
        return
    for file in folder.glob("*config.json"):
        try:
            said = json.loads(file.read_bytes())  # tokenizers have numbers of 100 bits: no limit of length
        except (ValueError, RecursionError):  # broken as it was where it is from
            continue
        if isinstance(said, dict) and said.pop("auto_map", None) is not None:
            write_text(file, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def require_free(
    target: Path, *, like: Path | str, overwrite: bool, inputs: Mapping[str, str | None] | None = None
) -> None:
    """Raise UserError unless a folder can be written, and nothing that is read is lost: before anything is computed."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} must be a folder: it is a file. Choose another --out.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if target.samefile(like):
        raise UserError(f"{target} is the folder that is read. Choose another --out.")
    if not (target / "config.json").is_file():
        raise UserError(
            f"{target} must be empty or a folder of transformers: it has other files. Choose another --out."
        )
    if not overwrite:
        raise UserError(f"{target} holds a model. Replace it (--overwrite), or choose another --out.")
    require_apart({"the folder": like, **(inputs or {})}, [target])
