"""Training a run, from text to checkpoints."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from moekit.data.held_out import HeldOut
from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.planner.measure import product_rate
from moekit.runs.config import RunConfig
from moekit.runs.init_from import InitFrom
from moekit.runs.module import make_module, parameters
from moekit.runs.plain import as_plain, plain
from moekit.runs.plan import expected
from moekit.runs.recipe import Recipe
from moekit.runs.run import Run
from moekit.runs.settings.fields import free_keys
from moekit.runs.settings.train import quiet
from moekit.runs.text import require_same_text, tokenizer_of
from moekit.training.callbacks.best import BestCheckpoint
from moekit.training.callbacks.config import ConfigInCheckpoints
from moekit.training.callbacks.expert_gradients import ScaleExpertGradients
from moekit.training.callbacks.gradient_norm import GradientNorm
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.limits import MaxMinutes
from moekit.training.callbacks.memory import PeakMemory
from moekit.training.callbacks.progress import TrainingProgress
from moekit.training.callbacks.random_state import RandomState
from moekit.training.callbacks.throughput import Throughput
from moekit.training.loggers import run_loggers
from moekit.training.multitask import MultitaskModule
from moekit.training.strategy import ExpertParallelStrategy

_FREE_RECORDS = ("vocab_size", "init_from", "teacher")
"""What is recorded beside the settings and may differ on resume; the first follows from the tokenizer."""


def fit(
    recipe: Recipe,
    variant: str,
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    init_from: InitFrom | None = None,
    resume_command: str = "",
    console: Console | None = None,
) -> Run:
    """Train, and leave a run folder.

    Everything is read and planned before the folder is made: settings and data that do not fit leave nothing behind.

    Args:
        recipe: whose model is trained.
        variant: its variant, for the record.
        config: the settings; see `RunConfig.settled`.
        out: the folder.
        resume: go on with the run that is there, if any.
        overwrite: replace it.
        init_from: another run that this one starts from.
        resume_command: what the user is told when training is interrupted.
        console: says what is trained.

    Raises:
        UserError: settings, data or the folder are at fault.
    """
    train = config.train
    train.check()
    strategy = config.strategy.strategy()
    settings = {"recipe": recipe.name, "variant": variant, **as_plain(config)}
    settings |= {} if init_from is None else init_from.record
    free = [*free_keys(config, "resume"), *_FREE_RECORDS]
    run = Run(out)
    going_on = resume and not overwrite and run.in_folder
    if going_on:
        run.require_same(settings, free)
    data = _training_text(run if going_on else None, config, init_from)
    held_out = HeldOut.of(data, plain(config.data.which_text()))  # what it is evaluated on
    L.seed_everything(train.seed, verbose=False)
    module, budget = make_module(
        recipe, config, data, MultitaskModule if init_from is None else init_from.make,
        empty=bool(config.strategy.empty_init), loaded=init_from is not None and init_from.loaded,
    )  # fmt: skip
    if isinstance(strategy, ExpertParallelStrategy):
        strategy.check(module, train.devices * train.num_nodes)
    rate = product_rate("cuda" if train.on_gpu else "cpu", train.product_type)
    forecast = expected(recipe, config)
    if is_first_process():  # which starts the others, if there are others
        run = Run.create(out, settings, resume=resume, overwrite=overwrite, free=free, measured={"product_rate": rate})
        run.keep(data.tokenizer, held_out)
    checkpoint = run.checkpoint_to_resume(settings, free) if resume else None
    trainer = train.trainer(
        strategy=strategy,
        logger=run_loggers(run.path),
        enable_checkpointing=True,
        callbacks=[
            MaxMinutes(budget),
            Throughput(
                flops_per_token=forecast.flops_per_token if forecast else None,
                product_rate=rate * train.devices * train.num_nodes,
            ),
            GradientNorm(),
            RandomState(),
            ConfigInCheckpoints({**settings, "vocab_size": data.tokenizer.vocab_size}),
            PeakMemory(forecast.memory.device if forecast else None),
            TrainingProgress(budget),
            *([ScaleExpertGradients()] if train.scale_expert_gradients else []),
            *_checkpoints(config, run, f"valid/{next(iter(module.heads))}/loss", resume_command),
        ],
        max_steps=train.max_steps or -1,
        max_epochs=-1 if not train.max_steps else None,
        val_check_interval=train.validate_every * train.accumulate or None,
        check_val_every_n_epoch=None if train.validate_every else 1,
        limit_val_batches=1.0 if train.validate_every else 0,
    )
    if trainer.is_global_zero and console is not None:
        lines = [_said(recipe, config, module, data, run), *([] if init_from is None else [init_from.note(module)])]
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
    with quiet():
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return run


def is_first_process() -> bool:
    """Whether this process makes folders and speaks: the one that starts the others, if there are others."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _checkpoints(config: RunConfig, run: Run, monitor: str, resume_command: str) -> list[Callback]:
    """Callbacks that write checkpoints; of several tasks the first is the one that the recipe is about."""
    train = config.train
    return [
        *([BestCheckpoint(run.checkpoints, monitor=monitor)] if train.validate_every else []),
        Resumable(
            run.checkpoints,
            every_n_steps=train.checkpoint_steps or None,
            every_n_minutes=train.checkpoint_minutes or None,
            how_to_resume=resume_command,
        ),
    ]


def _training_text(run: Run | None, config: RunConfig, init_from: InitFrom | None) -> MultitaskData:
    """The corpus, with the tokenizer of the run that goes on, or of the one that it starts from."""
    tokenizer = None if init_from is None else init_from.tokenizer
    try:
        if run is not None and tokenizer is None:
            tokenizer = tokenizer_of(run, config)
        data = config.batches(tokenizer)
    except UserError as error:
        if (run is not None or init_from is not None) and config.data.missing_paths():
            raise UserError(
                f"{error} A run keeps the sentences that it is evaluated on, not those that it was trained on: "
                "give text to train on with --data.source and --data.path."
            ) from error
        raise
    if run is not None:
        require_same_text(run, data, config)
    return data


def _said(recipe: Recipe, config: RunConfig, module: MultitaskModule, data: MultitaskData, run: Run) -> str:
    """What is about to be trained, in three lines."""
    counts, train = parameters(module.backbone), config.train
    sparse = f", {counts['active']:,} active for a token" if counts["active"] != counts["total"] else ""
    ends = [f"{train.max_steps:,} steps"] if train.max_steps else []
    ends += [f"{train.max_minutes:g} minutes"] if train.max_minutes else []
    tf32 = train.on_gpu and torch.get_float32_matmul_precision() != "highest"
    return (
        f"[bold]{recipe.name}[/] {run.path}\n"
        f"data      {','.join(config.data.sources)}: {len(data.languages)} languages ({', '.join(data.languages)}), "
        f"{f'{len(data.directions)} directions, ' if data.directions else ''}"
        f"vocabulary {data.tokenizer.vocab_size:,}\n"
        f"model     {counts['total']:,} parameters{sparse}; tasks {', '.join(module.heads)}\n"
        f"training  at most {' or '.join(ends)} on {_number(train.devices, 'process', 'processes')} with "
        f"{_number(torch.get_num_threads(), 'thread', 'threads')} each, precision {train.precision}"
        f"{' with TF32' if tf32 else ''}"
    )


def _number(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"
