"""From a recipe's data settings to sources, and from those and its tasks to batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moekit.data.held_out import HeldOut, HeldOutData
from moekit.data.mixture import TemperatureSchedule, heating
from moekit.data.module import MultitaskData
from moekit.data.sources import Source, Union, open_source
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.recipes._config import DataConfig, EvaluateConfig, active_tasks
from moekit.tasks import task_data


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def open_sources(config: DataConfig) -> Source:
    """The corpus that the settings describe.

    Raises:
        UserError: wrong number of paths, an unknown kind, or whatever is wrong with the data.
    """
    kinds, paths = _listed(config.source), _listed(config.path)
    if not kinds:
        raise UserError("data.source must name at least one kind of data, such as babel or moses: got nothing.")
    free = [kind for kind in kinds if kind in ("babel", "headlines", "gettext")]
    needed = len(kinds) - len(free)
    if len(paths) not in (needed, len(kinds)):
        folders = {0: "no folder", 1: "one folder"}.get(needed, f"{needed} folders, joined by commas,")
        raise UserError(
            f"data.path must give {folders} for data.source {config.source}: got "
            f"{len(paths)}. For example --data.source moses --data.path my/corpus."
        )
    remaining = iter(paths)
    everything = len(paths) == len(kinds)
    opened = []
    for kind in kinds:
        path = next(remaining) if everything or kind not in free else None
        opened.append(_open(kind, path, config))
    return opened[0] if len(opened) == 1 else Union(opened)


def missing_paths(config: DataConfig) -> list[str]:
    """Those of the settings' paths where nothing is."""
    return [path for path in _listed(config.path) if not Path(path).exists()]


def _open(kind: str, path: str | None, config: DataConfig) -> Source:
    pivot = {"none": None, "auto": "auto"}.get(config.pivot, config.pivot)
    directions = _listed(config.directions) or None
    match kind:
        case "babel":
            return open_source(
                "babel",
                None,
                seed=config.seed - 1,
                languages=config.babel_languages,
                train_sentences=config.babel_sentences,
                sizes=_sizes(config.babel_sizes),
                directions=None if directions is None else tuple(directions),
            )
        case "headlines":
            return open_source(
                "headlines",
                None,
                seed=config.seed - 1,
                languages=config.babel_languages,
                train_documents=config.babel_sentences,
                directions=directions,
            )
        case "text":
            return open_source("text", path)
        case "examples":
            return open_source("examples", path, directions=directions)
        case "gettext":
            return open_source("gettext", path, max_languages=config.max_languages, pivot=pivot, directions=directions)
        case _:
            return open_source(kind, path, pivot=pivot, directions=directions)


def temperature(config: DataConfig) -> TemperatureSchedule:
    """The schedule of the mixture over directions and languages."""
    return heating(config.heating, config.temperature, config.heating_steps)


def _sizes(text: str | None) -> dict[str, int]:
    """Sizes by language from ``kmb=2000,shl=500``."""
    sizes = {}
    for part in _listed(text):
        code, _, size = part.partition("=")
        if not size.strip().isdecimal():
            raise UserError(f"data.babel_sizes must be like kmb=2000,shl=500: got {part!r}.")
        sizes[code.strip()] = int(size)
    return sizes


def make_data(
    config: DataConfig,
    tasks: Any,
    evaluate: EvaluateConfig,
    *,
    devices: int,
    steps: int,
    source: Source | None = None,
    tokenizer: Tokenizer | None = None,
) -> MultitaskData:
    """The data module of a run.

    Args:
        config: the data's settings.
        tasks: with their tokens per step and device.
        evaluate: how many sentences are used in evaluation.
        devices: processes that share a step.
        steps: batches of the longest possible run; one epoch of that length, so that every stop is in its middle.
        source: an opened corpus, or what a run kept of one for evaluation; None = open it.
        tokenizer: one that exists; None = what the settings say.
    """
    active = active_tasks(tasks)
    if not active:
        raise UserError("tasks must give at least one task its tokens: all have 0. Set tasks.translation.tokens.")
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
    source = open_sources(config) if source is None else source
    make: Callable[..., MultitaskData] = HeldOutData if isinstance(source, HeldOut) else MultitaskData
    return make(
        source,
        tasks=task_data(active, config),
        tokenizer=tokenizer,
        cache=config.cache,
        vocab_size=config.vocab_size,
        tokens_per_step=devices * sum(task.tokens for task in active.values()),
        evaluation_tokens=devices * evaluate.batch_tokens,
        temperature=temperature(config),
        max_length=config.max_length,
        steps_per_epoch=steps,
        valid_sentences=evaluate.valid_sentences or None,
        test_sentences=evaluate.max_sentences or None,
        seed=config.seed,
        order_seed=config.order_seed,
        num_workers=0 if config.num_workers == "auto" else config.num_workers,
    )
