"""What the processes of a run must have in common."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit.data.module import MultitaskData
from moekit.runs.plain import flatten
from moekit.runs.recipe import Recipe

_OWN = ("data.path", "data.cache", "data.tokenizer", "data.num_workers", "init_from", "teacher")
"""Settings that each machine may have for itself: paths, whose content is compared, and workers."""


def shared_facts(recipe: Recipe, settings: Mapping[str, Any], data: MultitaskData) -> dict[str, Any]:
    """What must be the same on all processes: settings, versions, the source of moekit and of the recipe, the text."""
    package = Path(moekit.__file__).parent
    sources = {*package.rglob("*.py"), Path(inspect.getfile(recipe.build))}
    digest = hashlib.sha256()
    for path in sorted(sources, key=lambda path: path.parts[-3:]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        **{name: value for name, value in flatten(settings).items() if not name.startswith(_OWN)},
        "version of moekit": moekit.__version__,
        "version of torch": torch.__version__,
        "source of moekit and the recipe": digest.hexdigest()[:16],
        "text": data.source.fingerprint()[:16],
        "tokenizer": data.tokenizer.fingerprint[:16],
    }
