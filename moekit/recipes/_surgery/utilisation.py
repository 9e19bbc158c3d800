"""How much each expert of a run is used: from its routing.json, or measured on its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.recipes._config import active_tasks
from moekit.recipes._parts import elsewhere, make_module, make_trainer, quiet
from moekit.recipes._run_text import evaluation_data
from moekit.recipes._surgery.subject import Subject, with_setting
from moekit.training.multitask import MultitaskModule
from moekit.transformer import routed_layers


def measured_load(subject: Subject, *, language: str | None = None, task: str | None = None) -> dict[str, Tensor]:
    """Float64[E] by layer: the share of assignments that each expert gets on the run's validation text.

    The numbers of routing.json are taken where they are of this checkpoint and of all tasks; else the model validates.

    Args:
        subject: the run.
        language: count this language alone.
        task: count this task alone.

    Raises:
        UserError: an unknown language or task, or one for which nothing was routed.
    """
    found = None if task is not None else written_load(subject)
    if found is None:
        found = _validated(subject, task)
    names = layer_names(subject)
    load = {}
    for layer in found["layers"]:
        if language is None:
            row = layer["load"]
        elif language in layer["load_by_language"]:
            row = layer["load_by_language"][language]
        else:
            raise UserError(
                f"--language must be one of {', '.join(layer['load_by_language'])}, the languages of {subject.path}: "
                f"got {language}."
            )
        load[names[layer["name"]]] = torch.tensor(row, dtype=torch.float64)
    if empty := [path for path, row in load.items() if not float(row.sum()) > 0]:
        what = " ".join(["no token", *([f"of {language}"] if language else []), *([f"in {task}"] if task else [])])
        raise UserError(f"{what} was routed in {empty[0]}: nothing to choose experts by.")
    return load


def written_load(subject: Subject) -> dict[str, Any] | None:
    """What routing.json says, None where there is none or it is of another checkpoint than the one `test` takes."""
    folder = subject.folder
    if folder is None or folder.best_checkpoint != subject.path or not (folder.path / "routing.json").is_file():
        return None
    try:
        found: dict[str, Any] = json.loads((folder.path / "routing.json").read_text(encoding="utf-8"))
        written = [(layer["name"], layer["num_experts"]) for layer in found["layers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.path / 'routing.json'} cannot be read ({error}). Write it again: test.") from None
    layers, names = subject.layers(), layer_names(subject)
    wanted = [(name, layers[path].num_experts) for name, path in names.items()]
    if written != wanted:
        raise UserError(f"{folder.path / 'routing.json'} is of another model: got {written} for {wanted}.")
    return found


def layer_names(subject: Subject) -> dict[str, str]:
    """Dotted paths of sparse layers by the names that reports have for them, such as ``encoder.1``."""
    model: Any = subject.model()
    paths = {id(module): path for path, module in model.named_modules()}
    return {name: paths[id(layer)] for name, layer in routed_layers(model["backbone"]).items()}


def trained_module(
    subject: Subject, data: MultitaskData, weights: Mapping[str, Tensor], config: Any
) -> MultitaskModule:
    """The run's module with the given weights, ready to validate."""
    module, _ = make_module(subject.build, config, data, loaded=True)
    module.load_state_dict(dict(weights))
    return module.eval()


def validate(module: MultitaskModule, data: MultitaskData, config: Any) -> Mapping[str, float]:
    """Metrics of one validation; the module's `routing` is that of it."""
    trainer = make_trainer(elsewhere(config.train), logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with quiet():
        found: Mapping[str, float] = trainer.validate(module, datamodule=data, verbose=False)[0]
    return found


def _validated(subject: Subject, task: str | None) -> dict[str, Any]:
    tasks = active_tasks(subject.config.tasks)
    config = subject.config
    if task is not None:
        if task not in tasks:
            raise UserError(f"--task must be one of {', '.join(tasks)}, the tasks of {subject.path}: got {task}.")
        for other in tasks:
            if other != task:
                config = with_setting(config, f"tasks.{other}.tokens", 0)
    # Text of the one task alone, and a module with the heads of all, whose weights there are.
    data = evaluation_data(config, subject.folder, subject.loaded.rest, str(subject.path))
    module = trained_module(subject, data, subject.loaded.weights, subject.config)
    validate(module, data, subject.config)
    if module.routing is None:
        raise UserError(f"{subject.path} routed nothing in validation: nothing to choose experts by.")
    return module.routing
