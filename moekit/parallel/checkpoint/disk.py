"""A checkpoint's place: how a finished folder comes into it, what killed saves leave beside it."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path

from moekit.atomic import flush
from moekit.parallel.checkpoint.index import INDEX


def commit(folder: Path, path: Path, data: str) -> None:
    """Put the finished hidden `folder`, with its subfolder `data`, into the checkpoint's place.

    A reader sees the old checkpoint or the new one, at any moment and after any crash. A file in the place (see
    `is_file_checkpoint`), which no folder can replace at once, is moved away first: for that moment there is none.
    """
    if path.is_file():
        former = path.with_name(f"{folder.name}.former")
        os.rename(path, former)
        os.rename(folder, path)
        flush(path.parent)
        former.unlink()
        return
    if not path.exists():
        os.rename(folder, path)
        flush(path.parent)
        return
    os.rename(folder / data, path / data)
    flush(path)
    os.replace(folder / INDEX, path / INDEX)
    flush(path)
    for old in path.glob("data-*"):
        if old.name != data:
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def is_file_checkpoint(path: Path) -> bool:
    """Whether there is a file as torch.save writes it, a checkpoint of plain Lightning for example."""
    return path.is_file() and zipfile.is_zipfile(path)


def hidden_folders(path: Path) -> list[Path]:
    """What unfinished saves to `path`, and unfinished removals, have left beside it."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    return [found for found in path.parent.iterdir() if pattern.fullmatch(found.name)] if path.parent.is_dir() else []
