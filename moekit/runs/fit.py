"""Training a run, from text to checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.text import Text

from moekit.data.held_out import HeldOut, left_out, remarks
from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.inference.translator import Translator, search_for
from moekit.lock import held
from moekit.performance import keep_memory
from moekit.planner import Forecast
from moekit.planner.census import parameters
from moekit.planner.measure import product_rate
from moekit.runs.config import RunConfig
from moekit.runs.domains import domain_data
from moekit.runs.facts import require_questions
from moekit.runs.init_from import InitFrom
from moekit.runs.module import make_module
from moekit.runs.plain import as_plain, plain
from moekit.runs.plan import expected
from moekit.runs.processes import shared_facts
from moekit.runs.recipe import Recipe, RunText
from moekit.runs.record import STOPPED
from moekit.runs.routing import recorders
from moekit.runs.run import Run
from moekit.runs.settings.fields import free_keys
from moekit.runs.smoke import WARNING
from moekit.runs.text import require_same_text, tokenizer_of
from moekit.shell import command_line
from moekit.terminal import visible
from moekit.training.budget import Budget
from moekit.training.callbacks.config import ConfigInCheckpoints
from moekit.training.callbacks.expert_gradients import ScaleExpertGradients
from moekit.training.callbacks.gradient_norm import GradientNorm
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.limits import MaxMinutes
from moekit.training.callbacks.memory import PeakMemory
from moekit.training.callbacks.non_finite import NonFinite, Reaction
from moekit.training.callbacks.progress import TrainingProgress
from moekit.training.callbacks.random_state import RandomState
from moekit.training.callbacks.routing_monitor import RoutingMonitor
from moekit.training.callbacks.same_ranks import SameOnRanks
from moekit.training.callbacks.throughput import Throughput
from moekit.training.callbacks.weights import kept_weights
from moekit.training.full_disk import full_disk_explained
from moekit.training.loggers import make_logger_folders, run_loggers
from moekit.training.monitoring.rules import WARNINGS
from moekit.training.multitask import MultitaskModule
from moekit.training.processes import explained, is_first_process, stop_noted
from moekit.training.quiet import quiet
from moekit.training.refusals import check_callbacks
from moekit.training.strategy import ExpertParallelStrategy
from moekit.training.written_together import WrittenTogether
from moekit.wording import counted

_FREE_RECORDS = ("vocab_size", "init_from", "teacher")
"""What is recorded beside the settings and may differ on resume; the first follows from the tokenizer."""

_REACTIONS: dict[str | None, Reaction] = {"raise": "stop", "skip": "skip"}
"""What ``strategy.nonfinite_gradients`` says in the words of ``train.on_non_finite``."""


def fit(
    recipe: Recipe,
    variant: str,
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    init_from: InitFrom | None = None,
    smoke: bool = False,
    resume_command: str = "",
    console: Console | None = None,
) -> Run:
    """Train, and leave a run folder.

    The folder is held from the beginning (`moekit.lock.held`). Everything is read and planned before it is filled,
    and a new run that ends before its first batch leaves nothing behind.

    Args:
        recipe: whose model is trained.
        variant: its variant, for the record.
        config: the settings; see `RunConfig.settled`.
        out: the folder.
        resume: go on with the run that is there, if any.
        overwrite: replace it.
        init_from: another run that this one starts from.
        smoke: whether it is a smoke test, which the record says.
        resume_command: what the user is told when training is interrupted.
        console: says what is trained.

    Raises:
        UserError: settings, data or the folder are at fault.
    """
    train = config.train
    train.check()
    keep_memory(train.keep_memory)
    config.evaluate.check()
    recipe.parts(config, RunText(config.data.vocab_size), "meta")  # refuses what does not fit, before text is read
    strategy = config.strategy.strategy()
    settings = {"recipe": recipe.name, "variant": variant, **as_plain(config), **({"smoke": True} if smoke else {})}
    settings |= {} if init_from is None else init_from.record
    free = [*free_keys(config, "resume"), *_FREE_RECORDS]
    run = Run(out)
    with contextlib.ExitStack() as stack:
        if is_first_process():  # which starts the others, if there are others
            run.require_free(resume=resume, overwrite=overwrite)
            stack.enter_context(held(run.path))
        going_on = resume and not overwrite and run.in_folder
        if going_on:
            run.require_same(settings, free)
        data = _training_text(run if going_on else None, config, init_from)
        if config.evaluate.domains:
            domain_data(config, data.tokenizer)  # refused now, not when training has ended
        if config.evaluate.words or config.evaluate.agreement:
            require_questions(config, data)  # likewise
        held_out = HeldOut.of(data, plain(config.data.which_text()))  # what it is evaluated on
        L.seed_everything(train.seed, verbose=False)
        module, budget = make_module(
            recipe, config, data, MultitaskModule if init_from is None else init_from.make,
            empty=bool(config.strategy.empty_init), loaded=init_from is not None and init_from.loaded,
        )  # fmt: skip
        validated = next((task for task, sentences in data.evaluated("valid").items() if sentences), None)
        kept = kept_weights(
            module, run.checkpoints, task=validated, validates=bool(train.validate_every), best=train.best or "",
            patience=train.patience, ema=train.ema, average_last=train.average_last,
        ) + (recorders(run, config, module) if train.record_routing else [])  # fmt: skip
        if isinstance(strategy, ExpertParallelStrategy):
            strategy.check(module, train.devices * train.num_nodes)
            check_callbacks(kept)
        rate = product_rate("cuda" if train.on_gpu else "cpu", train.product_type)
        trainer = train.trainer(
            strategy=strategy,
            logger=run_loggers(run.path, train.loggers),
            callbacks=[
                SameOnRanks(shared_facts(recipe, settings, data) if train.devices * train.num_nodes > 1 else {}),
                ConfigInCheckpoints({**settings, "vocab_size": data.tokenizer.vocab_size}),
                *_callbacks(config, budget, rate, expected(recipe, config), run),
                *kept,
                Resumable(
                    run.checkpoints,
                    every_n_steps=train.checkpoint_steps or None,
                    every_n_minutes=train.checkpoint_minutes or None,
                    how_to_resume=resume_command,
                ),
            ],
            max_steps=train.max_steps or -1,
            max_epochs=-1 if not train.max_steps else None,
            val_check_interval=train.validate_every * train.accumulate or None,
            check_val_every_n_epoch=None if train.validate_every else 1,
            limit_val_batches=1.0 if train.validate_every else 0,
        )
        if is_first_process():
            if not going_on:
                stack.callback(_clear_if_nothing_began, run, trainer)
            rates = {"product_rate": rate}
            Run.create(out, settings, resume=resume, overwrite=overwrite, free=free, measured=rates)
            run.keep(data.tokenizer, held_out)
            make_logger_folders(run.path, train.loggers)
        checkpoint = run.checkpoint_to_resume(settings, free) if resume else None
        if config.evaluate.score_valid and data.directions:
            module.answers.translate, module.answers.originals = _writer(config, module, data), data.originals("valid")
        if trainer.is_global_zero and console is not None:
            notes = [*left_out(held_out.corpus.training, data.max_length), *remarks(data, held_out.corpus)]
            said: list[str | tuple[str, str]] = [(recipe.name, "bold"), f" {visible(_said(config, module, data, run))}"]
            for note in notes:
                said += [("\n! ", "yellow"), visible(note)]
            said += [] if init_from is None else [f"\n{visible(init_from.note(module))}"]
            said += [(f"\n{WARNING}", "bold yellow")] if smoke else []
            console.print(Text.assemble(*said), soft_wrap=True)
        noted = stop_noted(trainer, run.path / STOPPED, command_line("report", run.path))
        with quiet(), explained(trainer), full_disk_explained(run.path, resume_command), noted:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return run


def _callbacks(config: RunConfig, budget: Budget, rate: float, forecast: Forecast | None, run: Run) -> list[Callback]:
    """What ends, measures and watches training."""
    train, progress = config.train, TrainingProgress(budget)
    return [
        MaxMinutes(budget),
        Throughput(
            flops_per_token=forecast.flops_per_token if forecast else None,
            product_rate=rate * train.devices * train.num_nodes,
        ),
        GradientNorm(),
        RandomState(),
        PeakMemory(forecast.memory.device if forecast else None),
        progress,
        *([ScaleExpertGradients()] if train.scale_expert_gradients else []),
        NonFinite(_REACTIONS.get(config.strategy.nonfinite_gradients, train.on_non_finite)),
        RoutingMonitor.of(vars(train.monitor), run.path / WARNINGS, progress.say),  # reads the norm of `NonFinite`
    ]


def _clear_if_nothing_began(run: Run, trainer: L.Trainer) -> None:
    """Remove what was written of a run whose training failed before its first batch."""
    if trainer.fit_loop.total_batch_idx < 0:
        run.clear()


def _writer(config: RunConfig, module: MultitaskModule, data: MultitaskData) -> WrittenTogether:
    """What writes answers in validation."""
    search = search_for(config.evaluate.score_valid_beam, config.evaluate.length_penalty)
    sentinel = config.data.sentinel
    return WrittenTogether(module, lambda model: Translator(model, data.tokenizer, search=search, sentinel=sentinel))


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


def _said(config: RunConfig, module: MultitaskModule, data: MultitaskData, run: Run) -> str:
    """What is about to be trained, in three lines."""
    counts, train = parameters(module.backbone), config.train
    sparse = f", {counts['active']:,} active for a token" if counts["active"] != counts["total"] else ""
    ends = [counted(train.max_steps, "step")] if train.max_steps else []
    ends += [f"{train.max_minutes:g} minute{'' if train.max_minutes == 1 else 's'}"] if train.max_minutes else []
    tf32 = train.on_gpu and torch.get_float32_matmul_precision() != "highest"
    return (
        f"{run.path}\n"
        f"data      {','.join(config.data.sources)}: {counted(len(data.languages), 'language')} "
        f"({', '.join(data.languages)}), "
        f"{counted(len(data.directions), 'direction') + ', ' if data.directions else ''}"
        f"vocabulary {data.tokenizer.vocab_size:,}\n"
        f"model     {counts['total']:,} parameters{sparse}; tasks {', '.join(module.heads)}\n"
        f"training  at most {' or '.join(ends)} on {counted(train.devices, 'process', 'processes')} with "
        f"{counted(torch.get_num_threads(), 'thread')} each, precision {train.precision}"
        f"{' with TF32' if tf32 else ''}"
    )
