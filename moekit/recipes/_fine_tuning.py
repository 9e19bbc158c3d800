"""The command `finetune`, which every recipe has: a run goes on with other data, some parameters, or adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from jsonargparse import ArgumentParser
from torch import Tensor

from moekit.errors import UserError
from moekit.recipes._command import Recipe, as_plain
from moekit.recipes._config import StrategyConfig, TrainConfig
from moekit.recipes._start import Start, open_run, own_tokenizer, tokenizer_of
from moekit.surgery.adapters import Target, add_adapters
from moekit.training.fine_tuning import set_expert_dropout, set_train_capacity, subset, train_only, with_slots
from moekit.training.multitask import MultitaskModule
from moekit.training.run_folder import RunFolder

if TYPE_CHECKING:
    from moekit.recipes._surgery.subject import Subject


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """What trains, and what else is particular to fine-tuning.

    Attributes:
        tune: parameters that train: all, non_moe, moe, experts, routers, attention, feed_forward, adapters, or several
            with + and - as in all-routers. Not given: adapters where there are some, else all.
        rank: of low-rank adapters; 0 = no adapters.
        alpha: an adapter counts alpha / rank.
        adapt: what gets adapters: some of experts, attention, feed_forward, joined by commas.
        expert_dropout: on hidden activations of experts (0.4 in arXiv:2101.03961, beside a model.dropout of 0.1); not
            given = as model.dropout.
        train_capacity: capacity factor in training, which decides how many tokens are dropped; 0 = none is; not given
            = as in the model's settings.
        optimizer: whether the optimizer's state is carried on from the run, or fresh.
    """

    tune: str | None = None
    rank: int = 0
    alpha: float = 16.0
    adapt: str = "experts,attention,feed_forward"
    expert_dropout: float | None = None
    train_capacity: float | None = None
    optimizer: Literal["carried", "fresh"] = "carried"


def options(parser: ArgumentParser) -> None:
    """What `finetune` takes beside the recipe's settings."""
    parser.add_argument(
        "--init_from",
        type=str,
        default=None,
        metavar="RUN",
        help="folder or checkpoint of the run to start from; all settings begin as that run has them, but for steps, "
        "schedule and learning rate",
    )
    parser.add_class_arguments(FineTuneConfig, "fine_tune")


def settings(recipe: Recipe[Any], run: Subject, variant: str | None) -> tuple[str, Any]:
    """Those of the run, with a gentler and shorter training; ours."""
    if run.recipe.name != recipe.name:
        raise UserError(
            f"{run.path} is a run of the recipe {run.recipe.name}: fine-tune it with python -m moekit.recipes."
            f"{run.recipe.name} finetune."
        )
    if variant is not None and variant != run.variant:
        raise UserError(f"settings begin as in {run.path}, a run of {run.variant}: leave out --variant {variant}.")
    train: TrainConfig = run.config.train
    gentle = dataclasses.replace(
        train,
        max_steps=500,
        max_minutes=0.0,
        learning_rate=train.learning_rate / 4,
        warmup_steps=50,
        schedule="constant",
        validate_every=100,
    )
    return run.variant, dataclasses.replace(run.config, train=gentle)


def begin(config: Any, given: Any, folder: RunFolder, *, resume: bool) -> Start:
    """What a run of fine-tuning starts with.

    Args:
        config: its settings.
        given: the command's options.
        folder: of the run.
        resume: whether it goes on from its own checkpoint, where there is one: then the other run is not needed.

    Raises:
        UserError: no run to start from, one with another network, or settings that do not suit the model.
    """
    if given.init_from is None:
        raise UserError("finetune needs a run to start from: give its folder with --init_from.")
    chosen = FineTuneConfig(**vars(given.fine_tune))
    going_on = resume and folder.last_checkpoint is not None
    run = None if going_on else open_run(given.init_from)
    weights: Mapping[str, Tensor] = {}
    slots: Mapping[str, Mapping[str, Any]] = {}
    steps = 0
    if run is not None:
        weights = run.loaded.weights
        rest = run.loaded.rest
        steps = int(rest.get("global_step", 0)) + int(rest.get("steps_before", 0))
        slots = _slots(run, config, chosen)
    tokenizer = own_tokenizer(folder) if run is None else tokenizer_of(run)

    def make(*parts: Any, **options: Any) -> MultitaskModule:
        if slots:
            options["optimizer"] = with_slots(options["optimizer"], slots)
        module = MultitaskModule(*parts, steps_before=steps, **options)
        if run is not None:
            _load(module, weights, given.init_from)
        try:
            _prepare(module, chosen)
        except ValueError as error:
            raise UserError(f"fine_tune: {error}") from None
        return module

    def note(module: MultitaskModule) -> str:
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        return f"start     {given.init_from}; {trained:,} of {total:,} parameters train ({_tune(chosen)})"

    record = {"init_from": str(Path(given.init_from)), "fine_tune": as_plain(chosen)}
    return Start(record, make, tokenizer, note, loaded=True)


def _tune(chosen: FineTuneConfig) -> str:
    return chosen.tune or ("adapters" if chosen.rank else "all")


def _prepare(module: MultitaskModule, chosen: FineTuneConfig) -> None:
    """Adapters, dropout, capacity, and what trains."""
    wanted = subset(_tune(chosen))
    if chosen.expert_dropout is not None:
        set_expert_dropout(module, chosen.expert_dropout)
    if chosen.train_capacity is not None:
        set_train_capacity(module, chosen.train_capacity or None)
    if chosen.rank:
        targets = cast(list[Target], [name.strip() for name in chosen.adapt.split(",") if name.strip()])
        add_adapters(module.backbone, rank=chosen.rank, alpha=chosen.alpha, targets=targets)
    train_only(module, wanted)


def _load(module: MultitaskModule, weights: Mapping[str, Tensor], where: str) -> None:
    """The backbone whole; of heads those that both have."""
    own = module.state_dict()
    for name, tensor in own.items():
        given = weights.get(name)
        if name.startswith("backbone.") and (given is None or given.shape != tensor.shape):
            got = "nothing" if given is None else f"shape {tuple(given.shape)}"
            raise UserError(
                f"{where}: the network must be that of the run it starts from: {name} is {tuple(tensor.shape)} here, "
                f"and {got} there. Settings of model may differ where weights do not: dropout, capacity."
            )
    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict({**own, **fitting})


def _slots(run: Subject, config: Any, chosen: FineTuneConfig) -> Mapping[str, Mapping[str, Any]]:
    if chosen.optimizer == "fresh" or chosen.rank:
        return {}
    found = run.slots() or {}
    if found and config.strategy != StrategyConfig():
        raise UserError(
            "optimizer state is carried on where every process holds the whole model: with --strategy.* give "
            "--fine_tune.optimizer fresh."
        )
    return found
