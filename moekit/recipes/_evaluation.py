"""Testing a trained run: scores, routing, samples, the summary, and the report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.inference.completer import Completer
from moekit.inference.translator import Translator, search_for
from moekit.recipes._config import EvaluateConfig
from moekit.recipes._parts import Build, make_module, make_trainer, parameters, quiet
from moekit.recipes._run_text import evaluation_data, require_same_text
from moekit.report import terminal_summary, write_report
from moekit.surgery.adapters import merged_state
from moekit.training.callbacks.progress import TrainingProgress
from moekit.training.checkpoint_state import LoadedState, load_rest, load_state
from moekit.training.multitask import MultitaskModule
from moekit.training.run_folder import RunFolder


def load(build: Build, config: Any, folder: RunFolder) -> tuple[MultitaskModule, MultitaskData, LoadedState]:
    """The trained module of a run, whole, its data, and the checkpoint it is from (the best, else the last).

    Raises:
        UserError: if nothing was trained there.
    """
    path = folder.best_checkpoint
    if path is None:
        raise UserError(f"{folder.path} holds no checkpoint: train first (run or fit).")
    checkpoint = load_state(path)
    data = evaluation_data(config, folder, checkpoint.rest, str(folder.path))
    module, _ = make_module(build, config, data, loaded=True)
    module.load_state_dict(merged_state(checkpoint.weights))  # adapters of fine-tuning become part of their matrices
    return module.eval(), data, checkpoint


def evaluate(build: Build, config: Any, folder: RunFolder, console: Console) -> None:
    """Validate, test, and write everything that the run's folder is to hold about it.

    Raises:
        UserError: the folder keeps no text, and the corpus is not what it was: the record would be of other data.
    """
    started = time.monotonic()
    settings: EvaluateConfig = config.evaluate
    module, data, checkpoint = load(build, config, folder)
    if folder.held_out is None:
        require_same_text(config, data, folder, checkpoint.rest, str(folder.path))
    search = search_for(settings.beam_size, settings.length_penalty)
    if data.directions:
        module.translate = Translator(module.backbone, data.tokenizer, search=search, sentinel=config.data.sentinel)
    else:
        module.write = Completer(module.backbone, data.tokenizer, search=search)

    def originals(direction: str, numbers: list[int]) -> tuple[list[str], list[str]]:
        pairs = data.pairs(direction, "test")
        return [pairs[i][0] for i in numbers], [pairs[i][1] for i in numbers]

    module.originals = originals
    trainer = make_trainer(config.train, logger=False, enable_checkpointing=False, callbacks=[TrainingProgress()])
    with quiet():
        valid = trainer.validate(module, datamodule=data, verbose=False)[0]
        trainer.test(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        _write(config, folder, module, data, checkpoint.rest, valid, time.monotonic() - started)
        terminal_summary(folder.path, console)


def _write(
    config: Any,
    folder: RunFolder,
    module: MultitaskModule,
    data: MultitaskData,
    checkpoint: Mapping[str, Any],
    valid: Mapping[str, float],
    seconds: float,
) -> None:
    """summary.json, routing.json, samples.json and report.html."""
    last = load_rest(folder.last_checkpoint) if folder.last_checkpoint else checkpoint
    used = last.get("callbacks", {})
    trained = used.get("Throughput", {})
    summary = {
        "recipe": folder.config().get("recipe"),
        "variant": folder.config().get("variant"),
        "data": {
            "source": config.data.source,
            "languages": list(data.languages),
            "directions": [str(direction) for direction in data.directions],
            "sentences": {name: row["sentences"] for name, row in data.summary().items()},
            "vocab_size": data.tokenizer.vocab_size,
        },
        "steps": int(last["global_step"]),
        "evaluated_step": int(checkpoint["global_step"]),
        "tokens": int(trained.get("tokens", 0)),
        "wall_seconds": used.get("MaxMinutes", {}).get("seconds", 0.0),
        "evaluation_seconds": seconds,
        "tokens_per_second": trained.get("tokens", 0) / max(trained.get("seconds", 0.0), 1e-9),
        "peak_memory": used.get("PeakMemory"),
        "parameters": parameters(module.backbone),
        **{"bleu": None, "chrf": None, **(module.scores or {})},
        "perplexity": {t: x for t, x in _by_task(valid, "perplexity").items() if data.task(t).perplexity},
        "loss": _by_task(valid, "loss"),
        "accuracy": _by_task(valid, "accuracy"),
        "test": module.tested,
        "routing": module.routing_summary,
        "tasks": {name: data.task(name).record() for name in data.tasks},
    }
    folder.write_json("samples.json", module.samples)
    if module.routing is not None:
        folder.write_json("routing.json", module.routing)
    folder.write_json("summary.json", summary)
    write_report(folder.path)


def _by_task(values: Mapping[str, float], what: str) -> dict[str, float]:
    return {name.split("/")[1]: v for name, v in values.items() if name.startswith("valid/") and name.endswith(what)}
