"""The commands of a multitask recipe: run, fit, test, generate, score, finetune, distill."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.recipes import _distilling, _fine_tuning, _planning, _scoring
from moekit.recipes._command import Command, Recipe, as_plain, from_plain
from moekit.recipes._config import TrainConfig
from moekit.recipes._data import missing_paths
from moekit.recipes._evaluation import evaluate
from moekit.recipes._generation import generate
from moekit.recipes._machine import on_gpu, settled
from moekit.recipes._parts import (
    Build,
    elsewhere,
    make_module,
    make_strategy,
    make_trainer,
    parameters,
    quiet,
    run_data,
)
from moekit.recipes._ranges import check_warmup
from moekit.recipes._run_text import corpus_note, held_out_text, require_same_text, run_tokenizer
from moekit.recipes._start import Start, default_out, defaults_from_run
from moekit.training.callbacks.best import BestCheckpoint
from moekit.training.callbacks.expert_gradients import ScaleExpertGradients
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.limits import MaxMinutes
from moekit.training.callbacks.memory import PeakMemory
from moekit.training.callbacks.progress import TrainingProgress
from moekit.training.callbacks.random_state import RandomState
from moekit.training.callbacks.throughput import Throughput
from moekit.training.checkpoint_state import load_rest
from moekit.training.loggers import run_loggers
from moekit.training.multitask import MultitaskModule
from moekit.training.run_folder import RunConfig, RunFolder, check_checkpoint
from moekit.training.strategy import ExpertParallelStrategy

# What may change when a run is resumed without making it another run.
_MAY_DIFFER = (
    "train.max_steps",
    "train.max_minutes",
    "train.checkpoint_minutes",
    "train.checkpoint_steps",
    "train.devices",
    "train.num_nodes",
    "strategy",
    "data.num_workers",
    "data.cache",
    "data.path",
    "data.tokenizer",
    "init_from",
    "teacher",
    "evaluate.beam_size",
    "evaluate.length_penalty",
    "evaluate.samples",
)


def commands(recipe: str, build: Build) -> dict[str, Command]:
    """The commands of a multitask recipe."""
    pipeline = Pipeline(recipe, build)
    return {
        "run": Command("train, test on held-out text, and write the report (default)", pipeline.run, _run_options),
        "fit": Command("train only", pipeline.fit, _run_options),
        "test": Command("test a trained run and write its report again", pipeline.test, _folder_options),
        "generate": Command("translate text, or continue it, with a trained run", pipeline.generate, _generate_options),
        "score": Command(
            "answer multiple-choice questions by the likeliest continuation",
            pipeline.score,
            _both(_folder_options, _scoring.options),
        ),
        "finetune": Command(
            "start from a run: other data, some parameters, adapters; train, test, report",
            partial(pipeline.start, command="finetune", begin=_fine_tuning.begin),
            _both(_run_options, _fine_tuning.options),
            partial(defaults_from_run, option="--init_from", command="finetune", settings=_fine_tuning.settings),
        ),
        "distill": Command(
            "train a smaller model on text and on what a run says of it; test, report",
            partial(pipeline.start, command="distill", begin=_distilling.begin),
            _both(_run_options, _distilling.options),
            partial(defaults_from_run, option="--teacher", command="distill", settings=_distilling.settings),
        ),
        "plan": Command("say what the model needs on a layout, without running it", pipeline.plan, _planning.options),
    }


def _both(*parts: Callable[[ArgumentParser], None]) -> Callable[[ArgumentParser], None]:
    def add(parser: ArgumentParser) -> None:
        for part in parts:
            part(parser)

    return add


def pipeline_of(recipe: Recipe[Any]) -> Pipeline:
    """The pipeline behind the commands of a recipe."""
    owner = getattr(recipe.commands["fit"].run, "__self__", None)
    assert isinstance(owner, Pipeline), "the commands of multitask recipes are methods of a Pipeline"
    return owner


def _run_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="folder of the run (default: runs/RECIPE-VARIANT, and -finetune or -distill behind it)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in that folder")


def _folder_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default=None, help="folder of the run (default: runs/RECIPE-VARIANT)")


def _generate_options(parser: ArgumentParser) -> None:
    _folder_options(parser)
    parser.add_argument("--from", type=str, default=None, dest="source_language", help="language of the input")
    parser.add_argument(
        "--to", type=str, default=None, dest="target_language", help="language wanted, of runs that translate"
    )
    parser.add_argument(
        "--input", type=str, default="-", help="file with one sentence or prompt per line; - = standard input"
    )
    parser.add_argument("--output", type=str, default="-", help="file for what is written; - = standard output")
    parser.add_argument(
        "--experts_in_memory",
        type=int,
        default=0,
        help="at most so many experts of each layer in memory, the others mapped from disk as tokens ask for them; "
        "0 = all",
    )


def _number(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _is_first_process() -> bool:
    """Whether this process makes folders and speaks: the one that starts the others, if there are others."""
    return getattr(rank_zero_only, "rank", 0) == 0


class Pipeline:
    """The life of a run, from text to report."""

    def __init__(self, recipe: str, build: Build) -> None:
        self.recipe, self.build = recipe, build
        self.console = Console()

    def run(self, config: Any, options: Namespace) -> int:
        """Train, test, report."""
        config = self._settled(config, options)
        folder = self._train(config, options)
        evaluate(self.build, config, folder, self.console)
        return 0

    def fit(self, config: Any, options: Namespace) -> int:
        """Train."""
        folder = self._train(self._settled(config, options), options)
        if _is_first_process():
            self.console.print(f"trained; test it with: {self._command('test', folder)}")
        return 0

    def test(self, config: Any, options: Namespace) -> int:
        """Test what was trained, with the configuration that its folder holds, on the devices that are asked for."""
        folder = RunFolder.open(self._folder(options))
        saved = self._saved(config, folder)
        saved = dataclasses.replace(saved, train=elsewhere(saved.train, config.train))
        if _is_first_process() and (note := corpus_note(saved, folder)):
            self.console.print(f"{folder.path}: {note}", highlight=False, soft_wrap=True, markup=False)
        evaluate(self.build, saved, folder, self.console)
        return 0

    def generate(self, config: Any, options: Namespace) -> int:
        """Translate a file or standard input, line by line, in order."""
        folder = RunFolder.open(self._folder(options))
        generate(self.build, self._saved(config, folder), folder, options)
        return 0

    def score(self, config: Any, options: Namespace) -> int:
        """Score continuations of a file of questions."""
        folder = RunFolder.open(self._folder(options))
        _scoring.score(self.build, self._saved(config, folder), folder, options)
        return 0

    def start(self, config: Any, options: Namespace, *, command: str, begin: Callable[..., Start]) -> int:
        """Train from another run, test, report."""
        folder = RunFolder(Path(options.out or default_out(self.recipe, options.variant, command)))
        options.out = str(folder.path)
        config = self._settled(config, options)
        self._train(config, options, begin(config, options, folder, resume=options.resume))
        evaluate(self.build, config, folder, self.console)
        return 0

    def plan(self, config: Any, options: Namespace) -> int:
        """Print parameters, memory, communication and operations of a layout."""
        _planning.forecast(self.build, config, options, self.console)
        return 0

    # -- training --------------------------------------------------------------------------------------------------

    def _train(self, config: Any, options: Namespace, start: Start | None = None) -> RunFolder:
        train: TrainConfig = config.train
        if not train.max_steps and not train.max_minutes:
            raise UserError("training needs an end: set train.max_steps or train.max_minutes (both are 0).")
        strategy = make_strategy(config.strategy)
        path = self._folder(options)
        settings = {"recipe": self.recipe, "variant": options.variant, **as_plain(config)}
        settings |= {} if start is None else start.record
        going_on = options.resume and not options.overwrite and (path / "config.yaml").is_file()
        if going_on:
            RunFolder(path).require_same(settings, _MAY_DIFFER)
        check_warmup(train)
        data = self._text(config, RunFolder(path) if going_on else None, start)
        # Reads and plans everything before the folder is made: bad data leaves nothing behind.
        held_out = held_out_text(config, data)
        L.seed_everything(train.seed, verbose=False)
        module, budget = make_module(
            self.build, config, data, MultitaskModule if start is None else start.make,
            empty=bool(config.strategy.empty_init), loaded=start is not None and start.loaded,
        )  # fmt: skip
        if isinstance(strategy, ExpertParallelStrategy):
            strategy.check(module, train.devices * train.num_nodes)  # a layout that does not fit leaves nothing either
        if _is_first_process():
            folder = RunFolder.create(
                path, settings, resume=options.resume, overwrite=options.overwrite, may_differ=_MAY_DIFFER
            )
            folder.keep(data.tokenizer, held_out)
        else:
            folder = RunFolder(path)  # the first process makes it, and starts the others
        checkpoint = folder.last_checkpoint if options.resume else None
        if checkpoint is not None:
            check_checkpoint(checkpoint, settings, may_differ=_MAY_DIFFER)
        callbacks = [
            MaxMinutes(budget),
            Throughput(),
            RandomState(),
            RunConfig(settings),
            PeakMemory(_planning.expected_bytes(self.build, config)),
            TrainingProgress(budget),
            *([ScaleExpertGradients()] if train.scale_expert_gradients else []),
            # Of several tasks the first is the one that the recipe is about.
            *(
                [BestCheckpoint(folder.checkpoints, monitor=f"valid/{next(iter(module.heads))}/loss")]
                if train.validate_every
                else []
            ),
            Resumable(
                folder.checkpoints,
                every_n_steps=train.checkpoint_steps or None,
                every_n_minutes=train.checkpoint_minutes or None,
                how_to_resume=self._resume_command(),
            ),
        ]
        trainer = make_trainer(
            train,
            strategy=strategy,
            logger=run_loggers(folder.path),
            enable_checkpointing=True,
            callbacks=callbacks,
            max_steps=train.max_steps or -1,
            max_epochs=-1 if not train.max_steps else None,
            val_check_interval=train.validate_every * train.accumulate or None,
            check_val_every_n_epoch=None if train.validate_every else 1,
            limit_val_batches=1.0 if train.validate_every else 0,
        )
        if trainer.is_global_zero:
            self._say(config, module, data, folder)
            if start is not None:
                self.console.print(start.note(module), highlight=False, soft_wrap=True)
        with quiet():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return folder

    def _settled(self, config: Any, options: Namespace) -> Any:
        """What "auto" is on this machine; a run that goes on keeps its precision."""
        folder = RunFolder(self._folder(options))
        going_on = options.resume and not options.overwrite and (folder.path / "config.yaml").is_file()
        return settled(config, folder.config() if going_on else None)

    def _text(self, config: Any, folder: RunFolder | None, start: Start | None) -> MultitaskData:
        """The corpus, with the tokenizer of the run in `folder`, which goes on, or of the one that it starts from."""
        checkpoint = None if folder is None else folder.last_checkpoint
        rest = {} if checkpoint is None else load_rest(checkpoint)
        where = "" if folder is None else f"the run in {folder.path}"
        tokenizer = None if start is None else start.tokenizer
        try:
            if folder is not None and tokenizer is None:
                tokenizer = run_tokenizer(config, folder, rest, where)
            data = run_data(config, tokenizer)
        except UserError as error:
            if (folder is not None or start is not None) and missing_paths(config.data):
                raise UserError(
                    f"{error} A run keeps the sentences that it is evaluated on, not those that it was trained on: "
                    "give text to train on with --data.source and --data.path."
                ) from error
            raise
        if folder is not None:
            require_same_text(config, data, folder, rest, where)
        return data

    # -- small things ----------------------------------------------------------------------------------------------

    def _folder(self, options: Namespace) -> Path:
        return Path(options.out or f"runs/{self.recipe}-{options.variant}")

    def _saved(self, config: Any, folder: RunFolder) -> Any:
        values = folder.config()
        if values.get("recipe") != self.recipe:
            raise UserError(f"{folder.path} must hold a run of {self.recipe}: it is of {values.get('recipe')}.")
        return from_plain(type(config), values, f"{folder.path}/config.yaml")

    def _resume_command(self) -> str:
        """The command that was given, with --resume."""
        given = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        return shlex.join(["python", "-m", f"moekit.recipes.{self.recipe}", *given, "--resume"])

    def _command(self, command: str, folder: RunFolder) -> str:
        return f"python -m moekit.recipes.{self.recipe} {command} --out {folder.path}"

    def _say(self, config: Any, module: MultitaskModule, data: MultitaskData, folder: RunFolder) -> None:
        """What is about to be trained, in three lines."""
        counts = parameters(module.backbone)
        sparse = f", {counts['active']:,} active for a token" if counts["active"] != counts["total"] else ""
        train: TrainConfig = config.train
        ends = [f"{train.max_steps:,} steps"] if train.max_steps else []
        ends += [f"{train.max_minutes:g} minutes"] if train.max_minutes else []
        self.console.print(
            f"[bold]{self.recipe}[/] {folder.path}\n"
            f"data      {config.data.source}: {len(data.languages)} languages ({', '.join(data.languages)}), "
            f"{f'{len(data.directions)} directions, ' if data.directions else ''}"
            f"vocabulary {data.tokenizer.vocab_size:,}\n"
            f"model     {counts['total']:,} parameters{sparse}; tasks {', '.join(module.heads)}\n"
            f"training  at most {' or '.join(ends)} on {_number(train.devices, 'process', 'processes')} with "
            f"{_number(torch.get_num_threads(), 'thread', 'threads')} each, precision {train.precision}"
            f"{' with TF32' if on_gpu(train) and torch.get_float32_matmul_precision() != 'highest' else ''}",
            highlight=False,
            soft_wrap=True,
        )
