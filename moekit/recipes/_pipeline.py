"""What recipes do: fit, test, report, generate. A recipe gives a configuration and a function that builds the parts."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from moekit.data.module import MultitaskData
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.heads.base import Head
from moekit.inference.translator import Translator, search_for
from moekit.layer import AuxLosses
from moekit.recipes._command import Command, from_plain, plain
from moekit.recipes._config import EvaluateConfig, TrainConfig, active_tasks
from moekit.recipes._data import make_data
from moekit.report import terminal_summary, write_report
from moekit.training.budget import Budget
from moekit.training.callbacks.best import BestCheckpoint
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.limits import MaxMinutes
from moekit.training.callbacks.progress import TrainingProgress
from moekit.training.callbacks.random_state import RandomState
from moekit.training.callbacks.throughput import Throughput
from moekit.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from moekit.training.loggers import run_loggers
from moekit.training.multitask import MultitaskModule
from moekit.training.optimizers import adamw
from moekit.training.run_folder import RunConfig, RunFolder, check_checkpoint
from moekit.training.schedules import Constant, Cosine, InverseSquareRoot

# What may change when a run is resumed without making it another run.
_MAY_DIFFER = (
    "train.max_steps",
    "train.max_minutes",
    "train.checkpoint_minutes",
    "train.checkpoint_steps",
    "train.devices",
    "data.num_workers",
    "data.cache",
    "data.path",
    "evaluate.beam_size",
    "evaluate.length_penalty",
    "evaluate.samples",
)
_ENDLESS = 100_000_000
"""Batches of a run that only minutes limit."""


@dataclass(frozen=True)
class Built:
    """The parts of a model: the network, its heads, and the weights of its routers' losses."""

    backbone: nn.Module
    heads: list[Head]
    aux: AuxLosses | None


Build = Callable[[Any, int], Built]


def commands(recipe: str, build: Build) -> dict[str, Command]:
    """The commands of a multitask recipe."""
    pipeline = Pipeline(recipe, build)
    return {
        "run": Command("train, test on held-out text, and write the report (default)", pipeline.run, _run_options),
        "fit": Command("train only", pipeline.fit, _run_options),
        "test": Command("test a trained run and write its report again", pipeline.test, _folder_options),
        "generate": Command("translate text with a trained run", pipeline.generate, _generate_options),
    }


def _run_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default=None, help="folder of the run (default: runs/RECIPE-VARIANT)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in that folder")


def _folder_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default=None, help="folder of the run (default: runs/RECIPE-VARIANT)")


def _generate_options(parser: ArgumentParser) -> None:
    _folder_options(parser)
    parser.add_argument("--from", type=str, default=None, dest="source_language", help="language of the input")
    parser.add_argument("--to", type=str, default=None, dest="target_language", help="language wanted")
    parser.add_argument("--input", type=str, default="-", help="file with one sentence per line; - = standard input")
    parser.add_argument("--output", type=str, default="-", help="file for the translations; - = standard output")


class Pipeline:
    """The life of a run, from text to report."""

    def __init__(self, recipe: str, build: Build) -> None:
        self.recipe, self.build = recipe, build
        self.console = Console()

    def run(self, config: Any, options: Namespace) -> int:
        """Train, test, report."""
        folder = self._train(config, options)
        self._evaluate(config, folder)
        return 0

    def fit(self, config: Any, options: Namespace) -> int:
        """Train."""
        folder = self._train(config, options)
        self.console.print(f"trained; test it with: {self._command('test', folder)}")
        return 0

    def test(self, config: Any, options: Namespace) -> int:
        """Test what was trained, with the configuration that its folder holds."""
        folder = RunFolder.open(self._folder(options))
        self._evaluate(self._saved(config, folder), folder)
        return 0

    def generate(self, config: Any, options: Namespace) -> int:
        """Translate a file or standard input, line by line, in order."""
        folder = RunFolder.open(self._folder(options))
        config = self._saved(config, folder)
        module, tokenizer = self._load(config, folder)
        source, target = (self._language(options[f"{side}_language"], side, tokenizer) for side in ("source", "target"))
        with _reading(options.input) as file:
            sentences = [line.rstrip("\r\n") for line in file]
        translator = Translator(
            module.backbone,
            tokenizer,
            search=search_for(config.evaluate.beam_size, config.evaluate.length_penalty),
            batch_tokens=config.evaluate.batch_tokens,
        )
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        with bar:
            task = bar.add_task(f"{source} to {target}", total=len(sentences))
            lines = translator.translate(sentences, source, target, advance=lambda n: bar.advance(task, n))
        text = "".join(line + "\n" for line in lines)
        if options.output == "-":
            sys.stdout.write(text)
        else:
            from moekit.training.atomic import write_text

            write_text(Path(options.output), text)
        return 0

    # -- training --------------------------------------------------------------------------------------------------

    def _train(self, config: Any, options: Namespace) -> RunFolder:
        train: TrainConfig = config.train
        if not train.max_steps and not train.max_minutes:
            raise UserError("training needs an end: set train.max_steps or train.max_minutes (both are 0).")
        path = self._folder(options)
        data = self._data(config)  # reads the text before the folder is made: bad data leaves nothing behind
        tokenizer = data.tokenizer
        settings = {"recipe": self.recipe, "variant": options.variant, **plain(config)}
        folder = RunFolder.create(
            path, settings, resume=options.resume, overwrite=options.overwrite, may_differ=_MAY_DIFFER
        )
        checkpoint = folder.last_checkpoint if options.resume else None
        if checkpoint is not None:
            check_checkpoint(checkpoint, settings, may_differ=_MAY_DIFFER)
        L.seed_everything(train.seed, verbose=False)
        module, budget = self._module(config, data, tokenizer)
        callbacks = [
            MaxMinutes(budget),
            Throughput(),
            RandomState(),
            RunConfig(settings),
            TrainingProgress(budget),
            *([BestCheckpoint(folder.checkpoints, monitor="valid/translation/loss")] if train.validate_every else []),
            Resumable(
                folder.checkpoints,
                every_n_steps=train.checkpoint_steps or None,
                every_n_minutes=train.checkpoint_minutes or None,
                how_to_resume=f"the same command with --resume --out {folder.path}",
            ),
        ]
        trainer = self._trainer(
            train,
            logger=run_loggers(folder.path),
            enable_checkpointing=True,
            callbacks=callbacks,
            max_steps=train.max_steps or -1,
            max_epochs=-1 if not train.max_steps else None,
            val_check_interval=train.validate_every * train.accumulate or None,
            check_val_every_n_epoch=None if train.validate_every else 1,
            limit_val_batches=1.0 if train.validate_every else 0,
        )
        self._say(config, module, data, folder)
        model = torch.compile(module) if train.compile else module
        with _quiet():
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)  # type: ignore[arg-type]
        return folder

    def _module(self, config: Any, data: MultitaskData, tokenizer: Tokenizer) -> tuple[MultitaskModule, Budget]:
        train: TrainConfig = config.train
        built = self.build(config, tokenizer.vocab_size)
        budget = Budget(max_steps=train.max_steps or None, max_minutes=train.max_minutes or None)

        def optimizer(module: nn.Module) -> torch.optim.Optimizer:
            return adamw(
                module,
                lr=train.learning_rate,
                betas=train.betas,
                weight_decay=train.weight_decay,
                expert_lr_multiplier=train.expert_lr_multiplier,
            )

        def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
            match train.schedule:
                case "cosine":
                    return Cosine(optimizer, budget, train.warmup_steps, minimum=0.05)
                case "inverse_square_root":
                    return InverseSquareRoot(optimizer, train.warmup_steps)
                case "constant":
                    return Constant(optimizer, train.warmup_steps)

        module = MultitaskModule(
            built.backbone,
            built.heads,
            weights={name: task.weight for name, task in active_tasks(config.tasks).items()},
            aux=built.aux,
            languages=tokenizer.languages,
            directions=[str(direction) for direction in data.directions],
            optimizer=optimizer,
            schedule=schedule,
            log_routing_every=train.log_every,
            samples=config.evaluate.samples,
        )
        return module, budget

    def _trainer(self, train: TrainConfig, **options: Any) -> L.Trainer:
        with _quiet():
            return L.Trainer(
                accelerator=train.accelerator,
                devices=train.devices,
                precision=train.precision,
                accumulate_grad_batches=train.accumulate,
                gradient_clip_val=train.clip or None,
                log_every_n_steps=train.log_every,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                plugins=[AtomicCheckpointIO()],
                use_distributed_sampler=False,
                **options,
            )

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _load(self, config: Any, folder: RunFolder) -> tuple[MultitaskModule, Tokenizer]:
        """The trained module, without its data."""
        data = self._data(config)
        module, _ = self._module(config, data, data.tokenizer)
        path = folder.best_checkpoint
        if path is None:
            raise UserError(f"{folder.path} holds no checkpoint to use: train first.")
        module.load_state_dict(load_checkpoint(path)["state_dict"])
        return module.eval(), data.tokenizer

    def _evaluate(self, config: Any, folder: RunFolder) -> None:
        started = time.monotonic()
        evaluate: EvaluateConfig = config.evaluate
        data = self._data(config)
        tokenizer = data.tokenizer
        module, _ = self._module(config, data, tokenizer)
        path = folder.best_checkpoint
        if path is None:
            raise UserError(f"{folder.path} holds no checkpoint to test: train first.")
        checkpoint = load_checkpoint(path)
        module.load_state_dict(checkpoint["state_dict"])
        module.translate = Translator(
            module.backbone, tokenizer, search=search_for(evaluate.beam_size, evaluate.length_penalty)
        )
        trainer = self._trainer(config.train, logger=False, enable_checkpointing=False, callbacks=[TrainingProgress()])
        with _quiet():
            valid = trainer.validate(module, datamodule=data, verbose=False)[0]
            trainer.test(module, datamodule=data, verbose=False)
        if trainer.is_global_zero:
            self._write(config, folder, module, data, checkpoint, valid, time.monotonic() - started)

    def _write(
        self,
        config: Any,
        folder: RunFolder,
        module: MultitaskModule,
        data: MultitaskData,
        checkpoint: Mapping[str, Any],
        valid: Mapping[str, float],
        seconds: float,
    ) -> None:
        """summary.json, routing.json, samples.json, report.html, and the summary on the terminal."""
        last = load_checkpoint(folder.last_checkpoint, mmap=True) if folder.last_checkpoint else checkpoint
        used = last.get("callbacks", {})
        trained = used.get("Throughput", {})
        scores = module.scores or {}
        summary = {
            "recipe": self.recipe,
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
            "parameters": parameters(module.backbone),
            "bleu": scores.get("bleu"),
            "chrf": scores.get("chrf"),
            "perplexity": _by_task(valid, "perplexity", skip=("replaced_token",)),
            "loss": _by_task(valid, "loss"),
            "accuracy": _by_task(valid, "accuracy"),
            "routing": module.routing_summary,
        }
        folder.write_json("samples.json", module.samples)
        if module.routing is not None:
            folder.write_json("routing.json", module.routing)
        folder.write_json("summary.json", summary)
        write_report(folder.path)
        terminal_summary(folder.path, self.console)

    # -- small things ----------------------------------------------------------------------------------------------

    def _data(self, config: Any) -> MultitaskData:
        steps = config.train.max_steps * config.train.accumulate or _ENDLESS
        return make_data(config.data, config.tasks, config.evaluate, devices=config.train.devices, steps=steps)

    def _folder(self, options: Namespace) -> Path:
        return Path(options.out or f"runs/{self.recipe}-{options.variant}")

    def _saved(self, config: Any, folder: RunFolder) -> Any:
        values = folder.config()
        if values.get("recipe") != self.recipe:
            raise UserError(f"{folder.path} must hold a run of {self.recipe}: it is of {values.get('recipe')}.")
        return from_plain(type(config), values, f"{folder.path}/config.yaml")

    def _language(self, language: str | None, side: str, tokenizer: Tokenizer) -> str:
        if language is None:
            option = "--from" if side == "source" else "--to"
            raise UserError(f"generate needs {option}: one of {', '.join(tokenizer.languages)}.")
        tokenizer.language_id(language)
        return language

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
            f"{len(data.directions)} directions, vocabulary {data.tokenizer.vocab_size:,}\n"
            f"model     {counts['total']:,} parameters{sparse}; tasks {', '.join(module.heads)}\n"
            f"training  at most {' or '.join(ends)} on {train.devices} process(es) with {torch.get_num_threads()} "
            "threads each",
            highlight=False,
            soft_wrap=True,
        )


def parameters(backbone: nn.Module) -> dict[str, int]:
    """Parameters of a network: all, and those that one token passes (k of an expert bank's E experts)."""
    total = sum(p.numel() for p in backbone.parameters())
    idle = 0
    for layer in backbone.modules():
        experts, router = getattr(layer, "experts", None), getattr(layer, "router", None)
        if isinstance(experts, nn.Module) and router is not None:
            share = getattr(router, "k", 1) / router.num_experts
            idle += round(sum(p.numel() for p in experts.parameters()) * (1 - share))
    return {"total": total, "active": total - idle}


def _by_task(values: Mapping[str, float], what: str, skip: tuple[str, ...] = ()) -> dict[str, float]:
    named = {name.split("/")[1]: v for name, v in values.items() if name.startswith("valid/") and name.endswith(what)}
    return {task: value for task, value in named.items() if task not in skip}


@contextlib.contextmanager
def _reading(name: str) -> Iterator[TextIO]:
    if name == "-":
        yield sys.stdin
        return
    try:
        with Path(name).open(encoding="utf-8", newline="\n") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read --input {name}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--input {name} must be UTF-8: byte {error.start} is not.") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's chatter, which says nothing that the run's own lines do not."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            warnings.filterwarnings("ignore", module="torch.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
