"""What every command of a recipe stands on: the parts of a model, the module around them, data and a Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from moekit.data.held_out import HeldOut
from moekit.data.module import MultitaskData
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.heads.base import Head
from moekit.layer import AuxLosses
from moekit.recipes._config import StrategyConfig, TrainConfig, active_tasks
from moekit.recipes._data import make_data
from moekit.recipes._machine import usable_accelerator, usable_precision, usable_workers
from moekit.training.budget import Budget
from moekit.training.checkpoint_io import AtomicCheckpointIO
from moekit.training.multitask import MultitaskModule
from moekit.training.optimizers import adafactor, adamw
from moekit.training.schedules import ConstantWithWarmup, Cosine, InverseSquareRoot
from moekit.training.strategy import ExpertParallelStrategy

_ENDLESS = 100_000_000
"""Batches of a run that only minutes limit."""


@dataclass(frozen=True)
class Built:
    """The parts of a model: the network, its heads, and the weights of its routers' losses."""

    backbone: nn.Module
    heads: list[Head]
    aux: AuxLosses | None


@dataclass(frozen=True)
class WithData:
    """A build that looks at the run's text, as tables made of token counts do: ``build(config, vocab_size, data)``.

    Without data it makes the same tensors with other values, for models that are only looked at or whose weights are
    loaded.
    """

    build: Callable[[Any, int, MultitaskData | None], Built]


Build = Callable[[Any, int], Built] | WithData
"""Makes the parts of a run: ``build(config, vocab_size)``, or a `WithData`."""


def build_parts(
    build: Build, config: Any, vocab_size: int, data: MultitaskData | None, device: str | None = None
) -> Built:
    """What a build makes; it sees the data only if it asks for them.

    Args:
        build: of the recipe.
        config: of the run.
        vocab_size: V.
        data: of the run; None = the weights will be loaded, or are not needed.
        device: where weights are made; None = where the caller's are. A build that looks at text ignores it: tables
            are not made of text without memory.
    """
    if isinstance(build, WithData) and data is not None:
        return build.build(config, vocab_size, data)
    with contextlib.nullcontext() if device is None else torch.device(device):
        return build.build(config, vocab_size, None) if isinstance(build, WithData) else build(config, vocab_size)


def run_data(config: Any, tokenizer: Tokenizer | None = None, held_out: HeldOut | None = None) -> MultitaskData:
    """The data module of a run; its one epoch is as long as the run may be, so that every stop is in its middle.

    Args:
        config: of the run.
        tokenizer: one that exists already; None = that of ``data.tokenizer``, or trained on the text.
        held_out: what the run kept for evaluation, which is then all there is; None = the corpus of the settings.
    """
    train: TrainConfig = config.train
    steps = train.max_steps * train.accumulate or _ENDLESS
    # Tensor-parallel partners read the same batch.
    readers = max(1, train.devices * train.num_nodes // (config.strategy.tensor_parallel_size or 1))
    here = dataclasses.replace(config.data, num_workers=usable_workers(config.data.num_workers, train))
    return make_data(
        here, config.tasks, config.evaluate, devices=readers, steps=steps, source=held_out, tokenizer=tokenizer
    )


def make_module(
    build: Build,
    config: Any,
    data: MultitaskData,
    make: Callable[..., MultitaskModule] = MultitaskModule,
    *,
    empty: bool = False,
    loaded: bool = False,
) -> tuple[MultitaskModule, Budget]:
    """The LightningModule of a run, made by `make`, and the budget that its schedule follows.

    Args:
        build: of the recipe.
        config: of the run.
        data: of the run.
        make: the module around network and heads.
        empty: whether it is made without memory.
        loaded: whether weights will be loaded in the place of all that is made here, so that no text is looked at.

    Raises:
        UserError: if the model should be made without memory and cannot be, or if its settings do not fit together.
    """
    train: TrainConfig = config.train
    tokenizer = data.tokenizer
    if empty and (isinstance(build, WithData) or make is not MultitaskModule):
        source = "text" if isinstance(build, WithData) else "the weights of another"
        raise UserError(
            f"strategy.empty_init needs a model whose weights are drawn: this one is made from {source}. Leave it out."
        )
    try:
        built = build_parts(build, config, tokenizer.vocab_size, None if loaded else data, "meta" if empty else None)
    except UserError:
        raise
    except ValueError as error:  # of a module, which knows arguments and no keys
        raise UserError(f"a model cannot be built with these settings: {error}") from error
    budget = Budget(max_steps=train.max_steps or None, max_minutes=train.max_minutes or None)

    module = make(
        built.backbone,
        built.heads,
        weights={name: task.weight for name, task in active_tasks(config.tasks).items()},
        aux=built.aux,
        languages=tokenizer.languages,
        directions=[str(direction) for direction in data.directions],
        optimizer=lambda module: make_optimizer(train, module),
        schedule=lambda optimizer: make_schedule(train, optimizer, budget),
        log_routing_every=train.log_every,
        samples=config.evaluate.samples,
    )
    return module, budget


def make_optimizer(train: TrainConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Raises:
        UserError: a setting of adafactor without it.
    """
    if train.optimizer == "adafactor":
        return adafactor(
            module,
            lr=train.learning_rate,
            clip_update=train.clip_update or None,
            weight_decay=train.weight_decay,
            expert_lr_multiplier=train.expert_lr_multiplier,
        )
    if train.clip_update != 1.0:
        raise UserError(f"train.clip_update={train.clip_update} is of adafactor. Use --train.optimizer adafactor.")
    return adamw(
        module,
        lr=train.learning_rate,
        betas=train.betas,
        weight_decay=train.weight_decay,
        expert_lr_multiplier=train.expert_lr_multiplier,
    )


def make_schedule(
    train: TrainConfig, optimizer: torch.optim.Optimizer, budget: Budget
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate schedule of a run, which follows its budget."""
    match train.schedule:
        case "cosine":
            # Where steps are given the learning rate is a function of the step alone, so that a resumed run
            # equals one that was never stopped; minutes then only end the run.
            length = Budget(max_steps=train.max_steps) if train.max_steps else budget
            return Cosine(optimizer, length, train.warmup_steps, minimum=0.05)
        case "inverse_square_root":
            return InverseSquareRoot(optimizer, train.warmup_steps)
        case "constant":
            return ConstantWithWarmup(optimizer, train.warmup_steps)


def make_strategy(settings: StrategyConfig) -> ExpertParallelStrategy | Literal["auto"]:
    """The strategy of training; "auto" where nothing about it is set.

    Raises:
        UserError: values that do not go together.
    """
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    if not given:
        return "auto"
    given.pop("empty_init", None)  # which says how the model is made
    try:
        return ExpertParallelStrategy(**given)
    except (ValueError, TypeError) as error:
        raise UserError(f"strategy: {error}") from None


def make_trainer(train: TrainConfig, **options: Any) -> L.Trainer:
    """A Trainer with the settings that training and evaluation share."""
    plugins: list[Any] = [] if isinstance(options.get("strategy"), ExpertParallelStrategy) else [AtomicCheckpointIO()]
    with quiet():
        return L.Trainer(
            accelerator=usable_accelerator(train.accelerator),
            devices=train.devices,
            num_nodes=train.num_nodes,
            precision=usable_precision(train),
            accumulate_grad_batches=train.accumulate,
            gradient_clip_val=train.clip or None,
            log_every_n_steps=train.log_every,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            plugins=plugins,  # a divided model is saved by its strategy
            use_distributed_sampler=False,
            **options,
        )


def elsewhere(train: TrainConfig, here: TrainConfig | None = None) -> TrainConfig:
    """The settings of a run on the devices of this machine, which need not be the one that it was trained on.

    Args:
        train: of the run; one that was kept to the CPU stays there.
        here: says which devices; None = one, of whatever kind there is.
    """
    here = TrainConfig() if here is None else here
    accelerator = "cpu" if train.accelerator == "cpu" else here.accelerator
    return dataclasses.replace(train, devices=here.devices, num_nodes=here.num_nodes, accelerator=accelerator)


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
