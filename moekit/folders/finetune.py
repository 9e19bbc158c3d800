"""Fine-tuning a folder of transformers, from text to a folder or an adapter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.text import Text

import moekit
from moekit.folder_text.chat import writes_date
from moekit.folder_text.encoding import Encoder, load_tokenizer
from moekit.folders.data import FolderData, num_tokens
from moekit.folders.expert_tokens import ExpertTokens
from moekit.folders.export import AdaptersAtEnd, exports, write_cards, write_model
from moekit.folders.module import FolderModule, adapted_model
from moekit.folders.packable import require_packable
from moekit.folders.parameters import counts, said_of, unreached
from moekit.folders.settings import FolderConfig
from moekit.folders.tuned import TunedFolder, as_settings
from moekit.huggingface import added_losses
from moekit.lock import held
from moekit.performance import keep_memory
from moekit.runs.plain import flatten
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
from moekit.training.checkpoint_state import load_rest
from moekit.training.full_disk import full_disk_explained
from moekit.training.loggers import make_logger_folders, run_loggers
from moekit.training.processes import explained, is_first_process, stop_noted
from moekit.training.quiet import quiet
from moekit.training.strategy import ExpertParallelStrategy
from moekit.wording import counted

MANY_PASSES = 20
"""How often text may be read without a word about it. Ours: fine-tuning is usually of one to some few."""

_UNDATED = "data.date has no effect: the chat template of the model does not write the date."
"""What is said of a date that nothing asks for."""

_REACTIONS: dict[str | None, Reaction] = {"raise": "stop", "skip": "skip"}
"""What ``strategy.nonfinite_gradients`` says in the words of ``train.on_non_finite``."""


@dataclass(frozen=True)
class FineTuned:
    """What came of it.

    Attributes:
        path: the folder of settings, metrics and checkpoints.
        exported: folders for transformers and PEFT.
        before: held-out loss in nats for a learned token, before training.
        after: the same after it.
        warnings: what the user should know of adapters and experts.
    """

    path: Path
    exported: tuple[Path, ...]
    before: float
    after: float
    warnings: tuple[str, ...]


def finetune_folder(
    config: FolderConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    merge: bool = False,
    callbacks: Callable[[TunedFolder], Sequence[Callback]] = lambda _: (),
    resume_command: str = "",
    console: Console | None = None,
) -> FineTuned:
    """Fine-tune a folder of transformers, and write what came of it.

    Everything is read and compared before anything is written. Weights that change give a folder of transformers,
    ``out/model``, adapters one for PEFT, ``out/adapter``.

    Args:
        config: the settings.
        out: the folder to write.
        resume: go on from the last checkpoint there, if any.
        overwrite: replace what is there.
        merge: whether a folder with merged weights is written beside adapters.
        callbacks: made of the folder, for the Trainer.
        resume_command: what the user is told when training is interrupted.
        console: says what is trained.

    Raises:
        UserError: settings, text, model or folder are at fault.
    """
    config.check()
    tuned = TunedFolder(out)
    with contextlib.ExitStack() as stack:
        if is_first_process():  # which starts the others, if there are others
            tuned.require_free(resume=resume, overwrite=overwrite)
            tuned.require_apart(config)
            stack.enter_context(held(tuned.path))
        going_on = resume and bool(tuned.settings)
        tokenizer = load_tokenizer(config.model)
        dated = writes_date(tokenizer)
        warnings = [] if dated or config.data.date is None else [_UNDATED]
        config = config.settled(tuned.settings if going_on else {}, dated=dated)
        train = config.train
        keep_memory(train.keep_memory)
        checkpoint = tuned.checkpoint_to_resume(config) if resume else None
        dtype = torch.bfloat16 if train.usable_precision == "bf16-true" else torch.float32
        plan = adapted_model(Path(config.model), config.fine_tune, device="meta", dtype=dtype)
        if config.data.pack:
            require_packable(plan)
        text = config.data
        encoder = Encoder(tokenizer, max_length=text.max_length, vocab_size=_vocabulary(plan), date=text.day)
        data = FolderData(config, encoder)
        if checkpoint is not None:  # before its weights are read, which may be of other shapes
            data.load_state_dict(load_rest(checkpoint).get(FolderData.__qualname__, {}))
        warnings += unreached(plan, config.fine_tune.targets) if config.fine_tune.rank else []
        warnings += _too_often(config, data)
        strategy = _strategy(config, plan, checkpoint)
        wanted = exports(tuned, config.fine_tune, merge=merge)
        module, trainer, tokens = _made(config, tuned, data, strategy, dtype, resume_command, callbacks(tuned))
        if is_first_process():
            tuned.create(config, overwrite=overwrite)
            if not going_on:
                stack.callback(_clear_if_nothing_began, tuned, trainer)
            make_logger_folders(tuned.path, train.loggers)
            if console is not None:
                console.print(_said(config, data, plan, tuned), soft_wrap=True)
                if resume and checkpoint is None:
                    _warn(console, [f"{tuned.path} has no checkpoint to go on from: it begins anew."])
                _warn(console, warnings)
        kept = tuned.results if going_on else {}
        before, after = kept.get("before"), kept.get("after")
        noted = stop_noted(trainer, tuned.stopped, f"see {tuned.path / 'metrics.csv'}")
        with quiet(), explained(trainer), full_disk_explained(tuned.path, resume_command), noted:
            if before is None:
                before = _held_out_loss(trainer, module, data)
                if trainer.is_global_zero:
                    tuned.add_results({"before": before, "parameters": counts(plan)})
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            if after is None or kept.get("steps") != trainer.global_step:  # else nothing was left to train
                after = _held_out_loss(trainer, module, data)
        found = tokens.idle_at_end
        if config.fine_tune.rank and "experts" in config.fine_tune.targets:
            found = [f"{line}: what their adapters do there is not learned." for line in found]
        else:
            found = [f"{line}." for line in found]
        if trainer.is_global_zero:
            tuned.add_results(
                {"after": after, "steps": trainer.global_step, "expert_tokens": tokens.at_end,
                 "warnings": [*warnings, *found]}
            )  # fmt: skip
            write_model(wanted, module, config.model, tuned, divided=isinstance(strategy, ExpertParallelStrategy))
            write_cards(wanted, config, data, tuned)
            if console is not None:
                _warn(console, found)
    return FineTuned(tuned.path, tuple(wanted.values()), before, after, (*warnings, *found))


def _made(
    config: FolderConfig,
    tuned: TunedFolder,
    data: FolderData,
    strategy: Any,
    dtype: torch.dtype,
    resume_command: str,
    more: Sequence[Callback],
) -> tuple[FolderModule, L.Trainer, ExpertTokens]:
    """Module and Trainer."""
    train, budget = config.train, config.train.budget()
    L.seed_everything(train.seed, verbose=False)
    module = FolderModule(
        config.model,
        config.fine_tune,
        optimizer=train.make_optimizer,
        schedule=lambda optimizer: train.make_schedule(optimizer, budget),
        dtype=dtype,
        divided=isinstance(strategy, ExpertParallelStrategy),
    )
    tokens = ExpertTokens()
    adapters = exports(tuned, config.fine_tune, merge=False).get("adapter")
    trainer = train.trainer(
        strategy=strategy,
        logger=run_loggers(tuned.path, train.loggers),
        callbacks=[
            SameOnRanks(_facts(config, data) if config.processes > 1 else {}),
            ConfigInCheckpoints(as_settings(config)),
            *_callbacks(config, budget, tuned),
            tokens,
            *more,
            Resumable(
                tuned.checkpoints,
                every_n_steps=train.checkpoint_steps or None,
                every_n_minutes=train.checkpoint_minutes or None,
                how_to_resume=resume_command,
            ),
            *([AdaptersAtEnd(adapters, config.model)] if adapters else []),
        ],
        max_steps=train.max_steps or -1,
        max_epochs=-1 if not train.max_steps else None,
        val_check_interval=train.validate_every * train.accumulate or None,
        check_val_every_n_epoch=None if train.validate_every else 1,
    )
    return module, trainer, tokens


def _callbacks(config: FolderConfig, budget: Budget, tuned: TunedFolder) -> list[Callback]:
    """What ends, measures and watches training."""
    train, progress = config.train, TrainingProgress(budget)
    return [
        MaxMinutes(budget),
        Throughput(lambda batch: batch.num_tokens()),
        GradientNorm(),
        RandomState(),
        PeakMemory(),
        progress,
        *([ScaleExpertGradients()] if train.scale_expert_gradients else []),
        NonFinite(_REACTIONS.get(config.strategy.nonfinite_gradients, train.on_non_finite)),
        RoutingMonitor.of(vars(train.monitor), tuned.warnings, progress.say),  # reads the norm of `NonFinite`
    ]


def _strategy(config: FolderConfig, plan: Any, checkpoint: Path | None) -> Any:
    """How the model is spread: on one process not at all, unless it is asked for or a checkpoint is of that form.

    Raises:
        UserError: the layout does not fit the processes or the model.
    """
    asked = config.strategy.strategy()
    if asked == "auto" and (config.processes > 1 or (checkpoint is not None and checkpoint.is_dir())):
        asked = ExpertParallelStrategy()
    if isinstance(asked, ExpertParallelStrategy):
        asked.check(plan, config.processes)
    return asked


def _held_out_loss(trainer: L.Trainer, module: FolderModule, data: FolderData) -> float:
    trainer.validate(module, datamodule=data, verbose=False)
    return float(trainer.callback_metrics["valid/loss"])


def _vocabulary(model: Any) -> int:
    """How many ids a model has rows for, both where they come in and where they go out."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    return min(int(table.weight.shape[0]) for table in tables if table is not None)


def _facts(config: FolderConfig, data: FolderData) -> dict[str, Any]:
    """What must be the same on all processes."""
    settings = {key: value for key, value in flatten(as_settings(config)).items() if "path" not in key}
    return {
        **settings,
        "version of moekit": moekit.__version__,
        "version of torch": torch.__version__,
        "text": data.digest,
    }


def _clear_if_nothing_began(tuned: TunedFolder, trainer: L.Trainer) -> None:
    """Remove what was written where training failed before its first batch."""
    if trainer.fit_loop.total_batch_idx < 0:
        tuned.clear()


def _said(config: FolderConfig, data: FolderData, plan: Any, tuned: TunedFolder) -> Text:
    """What is about to be trained."""
    text, train = config.data, config.train
    rows, examples = data.train.rows, data.train.examples
    tokens = counted(num_tokens(examples.examples), "token")
    lines = [
        f"data      {text.path}: {counted(len(examples.examples), 'example')} of {tokens} in "
        f"{counted(len(rows), 'row')} of at most {text.max_length:,}; "
        f"{counted(len(data.valid.examples.examples), 'example')} held out",
        f"model     {type(plan).__name__}; routers add {added_losses(plan)!r} to the loss",
        f"training  {_ends(config)} of {counted(text.batch_size, 'row')}"
        + (f", {_passes(config, data):.3g} times the data" if train.max_steps else "")
        + f", on {counted(config.processes, 'process', 'processes')} in {train.usable_precision}",
        *(f"{'trains' if not n else '':<9} {line}" for n, line in enumerate(said_of(plan))),
    ]
    notes = []
    for split, name in ((data.train, "training"), (data.valid, "held-out")):
        if split.examples.cut:
            notes.append(f"cut to data.max_length tokens: {counted(split.examples.cut, f'{name} example')}.")
        if split.examples.empty:
            left_out = counted(split.examples.empty, f"{name} example")
            notes.append(f"left out, as nothing is to be learned within data.max_length tokens: {left_out}.")
    positions = getattr(plan.config, "max_position_embeddings", None) or math.inf
    if long := sum(len(one) > positions for split in (data.train, data.valid) for one in split.examples.examples):
        notes.append(
            f"longer than the {positions:,} positions of the model: {counted(long, 'example')}. Lower data.max_length."
        )
    said: list[str | tuple[str, str]] = [
        ("finetune", "bold"),
        f" {visible(config.model)} -> {visible(str(tuned.path))}",
    ]
    said += [f"\n{visible(line)}" for line in lines]
    for note in notes:
        said += [("\n! ", "yellow"), visible(note)]
    return Text.assemble(*said)


def _passes(config: FolderConfig, data: FolderData) -> float:
    """How often the steps of training read the training text."""
    return config.train.max_steps * config.data.batch_size / len(data.train.rows)


def _too_often(config: FolderConfig, data: FolderData) -> list[str]:
    """What is to be said of little text and many steps."""
    passes = _passes(config, data)
    if passes <= MANY_PASSES:
        return []
    fewer = max(1, MANY_PASSES * len(data.train.rows) // config.data.batch_size)
    return [
        f"training reads its text {passes:,.0f} times, and may learn it by heart: "
        f"{counted(config.train.max_steps, 'step')} of {counted(config.data.batch_size, 'row')} over "
        f"{counted(len(data.train.rows), 'row')} of text. Give more text, or fewer steps: --train.max_steps {fewer} "
        f"reads it {MANY_PASSES} times."
    ]


def _ends(config: FolderConfig) -> str:
    train = config.train
    ends = [counted(train.max_steps, "step")] if train.max_steps else []
    if (minutes := train.max_minutes) and math.isfinite(minutes):
        ends.append(f"{minutes:g} minute{'' if minutes == 1 else 's'}")
    return f"at most {' or '.join(ends)}"


def _warn(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(Text.assemble(("! ", "yellow"), visible(line)), soft_wrap=True)
