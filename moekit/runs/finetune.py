"""Fine-tuning: a run goes on with other data, some parameters, or adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.runs.init_from import InitFrom, choices_from, starting_tokenizer
from moekit.runs.recipe import Recipe
from moekit.runs.run import Run
from moekit.runs.settings.fields import setting
from moekit.runs.settings.train import StrategyConfig
from moekit.runs.surgery.optimizer import optimizer_slots
from moekit.shell import command_line
from moekit.surgery.adapters import Target, add_adapters
from moekit.training.fine_tuning import set_expert_dropout, set_train_capacity, subset, train_only, with_slots
from moekit.training.multitask import MultitaskModule


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """What fine-tuning trains, and how.

    Attributes:
        tune: parameters to train: all, non_moe, moe, experts, routers, attention, feed_forward or adapters; combine
            them with + and -, as in all-routers. Not given = adapters if rank is above 0, else all.
        rank: rank of the low-rank adapters (LoRA); 4 to 16 is usual, 0 = no adapters.
        alpha: scaling of the adapters: their output is multiplied by alpha / rank.
        adapt: modules that get adapters: experts, routers, attention, feed_forward, or several joined by commas.
        expert_dropout: dropout on the hidden activations of experts; 0.4 with a model.dropout of 0.1 in
            arXiv:2101.03961. Not given = model.dropout.
        train_capacity: capacity factor during fine-tuning, which decides how many tokens are dropped; 0 = no token is
            dropped; not given = the model's own.
        optimizer: state of the optimizer: carried over from the run (carried), or reset (fresh).
    """

    tune: str | None = None
    rank: int = setting(0, at_least=0)
    alpha: float = setting(16.0, above=0)
    adapt: str = "experts,attention,feed_forward"
    expert_dropout: float | None = setting(None, at_least=0, below=1)
    train_capacity: float | None = setting(None, at_least=0)
    optimizer: Literal["carried", "fresh"] = "carried"


class FineTuning(InitFrom):
    """The weights of a run, and what of them trains; a run that goes on has them in its own checkpoint."""

    command, option, purpose = "finetune", "init_from", "a run to start from"
    group, choices = "fine_tune", FineTuneConfig
    loaded = True
    chosen: FineTuneConfig

    def __init__(self, source: str | None, chosen: FineTuneConfig, config: RunConfig, own: Run | None) -> None:
        super().__init__(source, chosen, config, own)
        self.run: Run | None = None
        self.steps_before = 0
        self.slots: Mapping[str, Mapping[str, Any]] = {}
        if own is None:
            self.run = Run.load(self.source)
            rest = self.run.loaded.rest
            self.steps_before = int(rest.get("global_step", 0)) + int(rest.get("steps_before", 0))
            self.slots = _slots(self.run, config, chosen)
            self.tokenizer = starting_tokenizer(self.run)

    @classmethod
    def starting_config(cls, recipe: Recipe, run: Run, variant: str | None) -> tuple[str, RunConfig]:
        """Those of the run, with a gentler and shorter training; ours.

        Raises:
            UserError: it is a run of another recipe or variant.
        """
        if run.recipe.name != recipe.name:
            raise UserError(
                f"{run.path} is a run of the recipe {run.recipe.name}: fine-tune it with "
                f"{command_line('finetune', run.recipe.name, '--init_from', run.path)}"
            )
        if variant is not None and variant != run.variant:
            raise UserError(f"settings begin as in {run.path}, a run of {run.variant}: leave out --variant {variant}.")
        return run.variant, gentler(run.config)

    def make(self, *parts: Any, **options: Any) -> MultitaskModule:
        """The module with the weights of the run; where the new run goes on, they come from its checkpoint.

        Raises:
            UserError: networks or settings do not fit.
        """
        if self.slots:
            options["optimizer"] = with_slots(options["optimizer"], self.slots)
        module = MultitaskModule(*parts, steps_before=self.steps_before, **options)
        if self.run is not None:
            _load(module, self.run.loaded.weights, self.source)
        prepare(module, self.chosen, module.backbone)
        return module

    def note(self, module: MultitaskModule) -> str:  # noqa: D102
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        return f"start     {self.source}; {trained:,} of {total:,} parameters train ({_tune(self.chosen)})"


def gentler(config: RunConfig) -> RunConfig:
    """Settings of fine-tuning from those of the run that it starts from: fewer steps at a lower rate; ours."""
    return config.changed(
        train={
            "max_steps": 500,
            "max_minutes": 0.0,
            "learning_rate": config.train.learning_rate / 4,
            "warmup_steps": 50,
            "schedule": "constant",
            "validate_every": 100,
        }
    )


def fine_tune_config(given: Mapping[str, Any]) -> FineTuneConfig:
    """The settings from plain data.

    Raises:
        UserError: one is unknown, or out of its range.
    """
    return choices_from(FineTuneConfig, "fine_tune", given)


def prepare(module: nn.Module, chosen: FineTuneConfig, backbone: nn.Module | None = None) -> None:
    """Set, in place, what of a model trains, and how: dropout, capacity, adapters, and the parameters that move.

    Args:
        module: the model.
        chosen: what is wanted.
        backbone: the part of it that adapters are added to; None = all.

    Raises:
        UserError: the model has not what is asked for.
    """
    try:
        wanted = subset(_tune(chosen))
        if chosen.expert_dropout is not None:
            set_expert_dropout(module, chosen.expert_dropout)
        if chosen.train_capacity is not None:
            set_train_capacity(module, chosen.train_capacity or None)
        if chosen.rank:
            targets = cast(list[Target], [name.strip() for name in chosen.adapt.split(",") if name.strip()])
            where = module if backbone is None else backbone
            add_adapters(where, rank=chosen.rank, alpha=chosen.alpha, targets=targets)
        train_only(module, wanted)
    except ValueError as error:
        raise UserError(f"fine_tune: {error}") from None


def require_network(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> None:
    """Make sure that the network of a state dict is that of other weights; heads may differ.

    Args:
        own: the state dict of network and heads.
        weights: those that it begins with.
        where: whose they are, which the message begins with.

    Raises:
        UserError: it has other tensors, or other shapes.
    """
    for name, tensor in own.items():
        given = weights.get(name)
        if name.startswith("backbone.") and (given is None or given.shape != tensor.shape):
            got = "nothing" if given is None else f"shape {tuple(given.shape)}"
            raise UserError(
                f"{where}: the network must be that of the run it starts from: {name} is {tuple(tensor.shape)} here, "
                f"and {got} there. Settings of model may differ where weights do not: dropout, capacity."
            )


def _tune(chosen: FineTuneConfig) -> str:
    return chosen.tune or ("adapters" if chosen.rank else "all")


def _load(module: MultitaskModule, weights: Mapping[str, Tensor], where: str) -> None:
    """The backbone whole; of heads those that both have."""
    own = module.state_dict()
    require_network(own, weights, where)
    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict({**own, **fitting})


def _slots(run: Run, config: RunConfig, chosen: FineTuneConfig) -> Mapping[str, Mapping[str, Any]]:
    if chosen.optimizer == "fresh" or chosen.rank:
        return {}
    found = optimizer_slots(run) or {}
    if found and config.strategy != StrategyConfig():
        raise UserError(
            "optimizer state is carried on where every process holds the whole model: with --strategy.* give "
            "--fine_tune.optimizer fresh."
        )
    return found
