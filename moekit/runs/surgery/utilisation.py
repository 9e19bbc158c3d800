"""How much each expert of a run is used: from its routing.json, or measured on its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.runs.evaluate import trained_module
from moekit.runs.plain import with_setting
from moekit.runs.record import RoutingRecord
from moekit.runs.run import Run
from moekit.runs.settings.tasks import active_tasks
from moekit.runs.text import evaluation_data
from moekit.surgery import ExpertUse, watch_experts
from moekit.surgery.pruning import Order
from moekit.training.multitask import MultitaskModule
from moekit.training.quiet import quiet
from moekit.transformer import routed_layers


def require_measured(order: Order, language: str | None, task: str | None) -> None:
    """Make sure that a way to choose experts looks at the text that was asked for.

    Raises:
        UserError: a language or a task is given, and does not count in this way.
    """
    if order == "random" and (language or task):
        raise UserError("--language and --task say whose utilisation counts: leave them out with --by random.")
    if order == "reap" and language:
        raise UserError("--by reap measures the text of all languages: leave --language out.")


def measured_load(run: Run, *, language: str | None = None, task: str | None = None) -> dict[str, Tensor]:
    """Float64[E] by layer: the share of assignments that each expert gets on the run's validation text.

    The numbers of routing.json are taken where they are of this checkpoint and of all tasks; else the model validates.

    With `language` or `task` this one alone counts.

    Raises:
        UserError: an unknown language or task, or one for which nothing was routed.
    """
    found = None if task is not None else written_load(run)
    if found is None:
        found = _validated(run, task)
    names = layer_names(run)
    load = {}
    for layer in found.layers:
        if language is None:
            row = layer.load
        elif language in layer.load_by_language:
            row = layer.load_by_language[language]
        else:
            raise UserError(
                f"--language must be one of {', '.join(layer.load_by_language)}, the languages of {run.path}: "
                f"got {language}."
            )
        load[names[layer.name]] = torch.tensor(row, dtype=torch.float64)
    if empty := [path for path, row in load.items() if not float(row.sum()) > 0]:
        what = " ".join(["no token", *([f"of {language}"] if language else []), *([f"in {task}"] if task else [])])
        raise UserError(f"{what} was routed in {empty[0]}: nothing to choose experts by.")
    return load


def measured_saliency(run: Run, *, task: str | None = None) -> dict[str, Tensor]:
    """Float64[E] by layer: `moekit.surgery.ExpertUse.saliency` on the run's validation text, of one task or of all.

    Raises:
        UserError: an unknown task, or a layer in which nothing was routed.
    """
    with ExitStack() as watching:
        use: dict[str, ExpertUse] = {}

        def watch(module: MultitaskModule) -> None:
            nonlocal use
            use = watching.enter_context(watch_experts(module))

        _validated(run, task, watch)
    if empty := [path for path in run.layers() if path not in use or not int(use[path].tokens.sum())]:
        raise UserError(f"no token was routed in {empty[0]}: nothing to choose experts by.")
    return {path: use[path].saliency for path in run.layers()}


def written_load(run: Run) -> RoutingRecord | None:
    """What routing.json says, None where there is none or it is of another checkpoint than the one `test` takes.

    Raises:
        UserError: it is of another model.
    """
    found = run.routing if run.best_checkpoint == run.checkpoint else None
    if found is None:
        return None
    written = [(layer.name, layer.num_experts) for layer in found.layers]
    layers, names = run.layers(), layer_names(run)
    wanted = [(name, layers[path].num_experts) for name, path in names.items()]
    if written != wanted:
        raise UserError(f"{run.path / 'routing.json'} is of another model: got {written} for {wanted}.")
    return found


def layer_names(run: Run) -> dict[str, str]:
    """Dotted paths of sparse layers by the names that reports have for them, such as ``encoder.1``."""
    model: Any = run.model()
    paths = {id(module): path for path, module in model.named_modules()}
    return {name: paths[id(layer)] for name, layer in routed_layers(model["backbone"]).items()}


def validate(module: MultitaskModule, data: MultitaskData, config: RunConfig) -> Mapping[str, float]:
    """Metrics of one validation; the module's `routing` is that of it."""
    trainer = config.train.elsewhere().trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with quiet():
        found: Mapping[str, float] = trainer.validate(module, datamodule=data, verbose=False)[0]
    return found


def _validated(
    run: Run, task: str | None, watch: Callable[[MultitaskModule], None] = lambda module: None
) -> RoutingRecord:
    tasks = active_tasks(run.config.tasks)
    config = run.config
    if task is not None:
        if task not in tasks:
            raise UserError(f"--task must be one of {', '.join(tasks)}, the tasks of {run.path}: got {task}.")
        for other in tasks:
            if other != task:
                config = with_setting(config, f"tasks.{other}.tokens", 0)
    # Text of the one task alone, and a module with the heads of all, whose weights there are.
    data = evaluation_data(run, config)
    module = trained_module(run, data)
    watch(module)
    validate(module, data, run.config)
    if module.routing is None:
        raise UserError(f"{run.path} routed nothing in validation: nothing to choose experts by.")
    return RoutingRecord.from_json(module.routing)
