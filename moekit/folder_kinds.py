"""What lies at a path that a user names, and what to give in its place where it is of another kind than is needed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import yaml

from moekit.errors import UserError
from moekit.stored import parse_yaml

Kind = Literal["nothing", "file", "empty", "run", "tuned", "checkpoint", "model", "adapters", "other"]
"""run = of a recipe; tuned = of a fine-tuning of a model of transformers; checkpoint = a sharded one; model = of
transformers; adapters = of PEFT."""

INDEX = "index.json"
"""In a sharded checkpoint."""

_CONFIG, _MODEL, _ADAPTERS = "config.yaml", "config.json", "adapter_config.json"
_MAX_BYTES = 2**20
_FOR_MODELS = "That is a folder of transformers, for the commands inspect, prune, merge, upcycle, curve and plan."


def kind_of(place: Path) -> Kind:
    """What lies at a path, by the names of its files; a configuration is read to tell fine-tunings from runs."""
    if not place.exists():
        return "nothing"
    if not place.is_dir():
        return "file"
    if (place / _CONFIG).is_file():
        return "tuned" if _is_tuned(place / _CONFIG) else "run"
    if (place / INDEX).is_file():
        return "checkpoint"
    if (place / _MODEL).is_file():
        return "model"
    if (place / _ADAPTERS).is_file():
        return "adapters"
    return "other" if any(place.iterdir()) else "empty"


def require_model(place: Path) -> None:
    """Make sure that a path is a folder of transformers, by its config.json.

    Raises:
        UserError: it is something else, which is named, with what to give in its place.
    """
    if not (place / _MODEL).is_file():
        said = _found(place, f"Give {place / 'model'}.")
        raise UserError(f"{place} must be a folder of transformers, with config.json and safetensors: {said}")


def require_run_folder(place: Path) -> None:
    """Make sure that a path is the folder of a run, by its config.yaml.

    Raises:
        UserError: it is something else, which is named, with what to give in its place.
    """
    if kind_of(place) != "run":
        raise UserError(f"{place} holds no run: {_found(place, _FOR_MODELS)} Give the folder of a run.")


def refuse_as_run(place: Path, *, or_model: bool = False) -> None:
    """Refuse what is no run and no checkpoint of one; what is in a file is for who reads it.

    Args:
        place: the path.
        or_model: whether a folder of transformers will do, too.

    Raises:
        UserError: it is something else, which is named, with what to give in its place.
    """
    if kind_of(place) not in ("run", "file", "checkpoint", *(["model"] if or_model else [])):
        said = _found(place, f"Give {place / 'model'}." if or_model else _FOR_MODELS)
        wanted = "a run, a checkpoint or a folder of transformers" if or_model else "a run or a checkpoint"
        raise UserError(f"{place} must be {wanted}: {said}")


def _found(place: Path, then: str) -> str:
    """What lies at a path, in sentences.

    Args:
        place: the path.
        then: what is said of a model that is there.
    """
    match kind_of(place):
        case "nothing":
            return "there is nothing."
        case "file":
            return "it is a file."
        case "empty":
            return "it is empty."
        case "run":
            return "it is of a run of moekit, of which the command export writes one."
        case "model":
            return f"it is of a model. {then}"
        case "tuned":
            return _tuned(place, then)
        case "adapters":
            return "it has adapters for PEFT. Merge them (finetune with --resume --merge), and give the model."
        case "checkpoint":
            return "it is a sharded checkpoint."
        case "other":
            return f"it has no {_MODEL}, no {_CONFIG} of a run and no {INDEX} of a checkpoint."


def _is_tuned(file: Path) -> bool:
    """Whether a config.yaml is of a fine-tuning: it names a model's folder where one of a run has its settings."""
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        with file.open("rb") as opened:
            values: Any = parse_yaml(opened.read(_MAX_BYTES).decode("utf-8-sig"))
        return isinstance(values, dict) and isinstance(values.get("model"), str) and "fine_tune" in values
    return False


def _tuned(place: Path, then: str) -> str:
    if (place / "model" / _MODEL).is_file():
        return f"it is of a fine-tuning, whose model is in {place / 'model'}. {then}"
    if (place / "adapter" / _ADAPTERS).is_file():
        return (
            "it is of a fine-tuning that wrote adapters alone. The same command with --resume --merge writes "
            f"{place / 'model'}."
        )
    return "it is of a fine-tuning that wrote no model yet. Go on with it: the same command with --resume."
