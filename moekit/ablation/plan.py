"""The runs of a table: settings resolved, paired by seed, and named by what they compute, so that tables share them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from moekit.ablation.arm import RATE, Arm
from moekit.ablation.ladder import FEWEST_SIZES
from moekit.ablation.table import AblationTable
from moekit.ablation.taken import check_taken
from moekit.babel.concepts import DEFAULT_CONCEPTS
from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.runs.finetune import gentler
from moekit.runs.plain import as_plain, flatten
from moekit.runs.recipe import Recipe, RunText, find_recipe
from moekit.runs.settings.monitor import MonitorConfig

Configure = Callable[[Recipe, RunConfig, Sequence[str]], RunConfig]
"""Applies options such as ``--model.dim=64`` to a configuration, as `moekit.cli.recipes.reconfigured` does."""

OF_EVERY_RUN: Mapping[str, Any] = {
    "train.max_minutes": 0,
    "train.init_by_name": True,
    "train.accelerator": "cpu",
    "train.precision": "32-true",
    "train.loggers": "csv",
    "train.checkpoint_minutes": 1,
    "data.num_workers": 0,
}
"""Settings of every run of a table that does not say otherwise: numbers that depend on no clock, weights in pairs."""

_WITHOUT_EFFECT = (
    "data.cache", "data.num_workers", "train.loggers", "train.checkpoint_minutes", "train.checkpoint_steps",
    "train.keep_memory",
)  # fmt: skip
"""Settings on which no number of a run depends."""

_SINCE = {
    "train.record_routing": 0, "data.facts_profiles": 0.0, "model.router": "table", "model.balance_scope": "batch",
    "model.shared": False, "model.selection": "random", "data.unit": "line", "data.text_field": "text",
    "evaluate.domains": None, "data.salient": None, "data.salient_share": 1.0, "evaluate.words": 0,
    "evaluate.agreement": 0,
    "data.babel_concepts": DEFAULT_CONCEPTS, "data.babel_cognates": 0.15,
    "model.evolve": True, "model.baseline": "feed_forward", "model.eval_assignment": "greedy",
    **{f"train.monitor.{field.name}": field.default for field in fields(MonitorConfig)},
}  # fmt: skip
"""Settings that digests of earlier runs do not know, with the value at which a run computes what it did before."""

_SEEDS = ("train.seed", "data.order_seed")


@dataclass(frozen=True)
class Job:
    """One run of an arm with one seed.

    Attributes:
        recipe: its name.
        variant: the variant that the settings began with.
        config: all settings.
        label: whose run it is, for the view.
        of: the run whose trained model is evaluated, gone on with, or taken something of; None = it needs no other.
        prune: options of the command prune, which is done first.
        fine_tune: options of the group fine_tune, of a run that goes on with the model; None = it does not.
        joined: the run whose experts are added to those of `of` before it goes on; None = none are.
        aggregate: options of the command aggregate, by which they are.
        distill: options of the group distill, of a run that learns from the model; None = it does not.
        given_as: the setting that takes the folder of `of`; "" = none does.
    """

    recipe: str
    variant: str
    config: RunConfig
    label: str
    of: Job | None = None
    prune: tuple[tuple[str, Any], ...] = ()
    fine_tune: tuple[tuple[str, Any], ...] | None = None
    joined: Job | None = None
    aggregate: tuple[tuple[str, Any], ...] = ()
    distill: tuple[tuple[str, Any], ...] | None = None
    given_as: str = ""

    @property
    def trains(self) -> bool:
        """Whether it takes optimizer steps of its own."""
        return self.of is None or self.fine_tune is not None or self.distill is not None or bool(self.given_as)

    @property
    def needs(self) -> tuple[Job, ...]:
        """The runs whose trained models it needs."""
        return tuple(job for job in (self.of, self.joined) if job is not None)

    @cached_property
    def digest(self) -> str:
        """Of what the run computes: equal for runs that compute the same, whatever table they are of."""
        return self._digest(())

    @cached_property
    def kin(self) -> str:
        """The same for all seeds and learning rates, which take the same time."""
        return self._digest((*_SEEDS, RATE))

    def _digest(self, without: Sequence[str]) -> str:
        settings = flatten(as_plain(self.config))
        left_out = {*_WITHOUT_EFFECT, *without, *(key for key, value in _SINCE.items() if settings.get(key) == value)}
        kept = {key: value for key, value in settings.items() if key not in left_out}
        of = None if self.of is None else self.of._digest(without)
        joined = None if self.joined is None else [self.joined._digest(without), self.aggregate]
        ways = {"fine_tune": self.fine_tune, "joined": joined, "distill": self.distill, "as": self.given_as or None}
        taken = [{name: value} for name, value in ways.items() if value is not None]
        text = json.dumps([self.recipe, kept, of, self.prune, *taken], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def steps(self) -> int:
        """Optimizer steps of its own."""
        return int(self.config.train.max_steps) if self.trains else 0

    def folder(self, runs: Path) -> Path:
        """Where it lies."""
        return runs / f"{self.recipe}-{self.digest}"


@dataclass(frozen=True)
class Plan:
    """A table with the settings of its arms.

    Attributes:
        table: the table.
        configs: of each arm, without seeds.
    """

    table: AblationTable
    configs: Mapping[str, RunConfig]

    @classmethod
    def of(cls, table: AblationTable, configure: Configure) -> Plan:
        """Resolve the settings of every arm, and build every model without memory.

        Raises:
            UserError: naming the file and the arm: a setting is unknown, out of its range, or does not fit.
        """
        recipe = find_recipe(table.recipe, str(table.path))
        base = _configured(recipe, recipe.variants[table.variant].config, OF_EVERY_RUN, configure, f"{table.path}")
        base = _configured(recipe, base, table.settings, configure, f"{table.path}: settings")
        _check_seeds(table)
        configs: dict[str, RunConfig] = {}
        models: dict[str, nn.ModuleDict] = {}
        for arm in sorted(table.arms.values(), key=lambda arm: bool(arm.of)):
            where = f"{table.path}: arms.{arm.name}.settings"
            begun = base if arm.begins else configs[arm.of]
            begun = begun if arm.fine_tune is None else gentler(begun)
            config = _configured(recipe, begun, arm.settings, configure, where)
            models[arm.name] = _model(recipe, arm, config, models, where)
            configs[arm.name] = config
        _check_ladders(table, configs, models)
        return cls(table, {name: configs[name] for name in table.arms})

    def job(self, arm: str, seed: int, rates: Mapping[str, float] | None = None) -> Job:
        """The run of an arm; `rates` are learning rates by arm that trains, where they are not the settings'."""
        made, owner = self.table.arms[arm], self.table.arms[arm].of
        rate = (rates or {}).get(arm if made.trains else owner)
        train: dict[str, Any] = {"seed": seed + made.seed_offset}
        if rate is not None:
            train["learning_rate"] = rate
        order = seed + made.seed_offset + made.order_offset
        config = self.configs[arm].changed(train=train, data={"order_seed": order})
        label = f"{arm}, seed {seed}" + ("" if rate is None else f", rate {rate:g}")
        aggregate = dict(made.aggregate)
        other = aggregate.pop("with", None)
        return Job(
            self.table.recipe,
            self.table.variant,
            config,
            label,
            self.job(owner, seed, rates) if owner else None,
            _sorted(made.prune),
            None if made.fine_tune is None else _sorted(made.fine_tune),
            self.job(other, seed, rates) if other else None,
            _sorted(aggregate),
            None if made.distill is None else _sorted(made.distill),
            made.given_as,
        )

    def trained(self, arms: Sequence[str] | None = None) -> list[str]:
        """The arms that train from scratch; only those whose models `arms` ask for."""
        asked = self.table.arms if arms is None else arms
        wanted = {name for arm in asked for name in (self.table.arms[arm].others or [arm])}
        return [name for name, arm in self.table.arms.items() if not arm.of and name in wanted]

    def fine_tuned(self, arms: Sequence[str] | None = None) -> list[str]:
        """The arms that go on with others' models; only those of `arms`."""
        return [
            name
            for name, arm in self.table.arms.items()
            if arm.fine_tune is not None and (arms is None or name in arms)
        ]

    def tuning_jobs(self, arms: Sequence[str] | None = None) -> list[Job]:
        """The runs that choose learning rates: every rate of the grid for every arm that trains from scratch."""
        grid = self.table.learning_rates
        if grid is None:
            return []
        every = ((seed, rate, arm) for seed in grid.seeds for rate in grid.values for arm in self.trained(arms))
        # Equal arms have the same runs.
        return list({job.digest: job for job in (self.job(arm, seed, {arm: x}) for seed, x, arm in every)}.values())

    def tuning_metrics(self, arms: Sequence[str] | None = None) -> dict[str, set[str]]:
        """What is asked of each of `tuning_jobs`, by digest."""
        grid = self.table.learning_rates
        return {} if grid is None else {job.digest: {grid.metric} for job in self.tuning_jobs(arms)}

    def metrics(self, rates: Mapping[str, float]) -> dict[str, set[str]]:
        """The metrics that claims and control ask of each run of the table, by digest."""
        found: dict[str, set[str]] = {}
        for question in self.table.questions:
            for arm, seed in ((arm, seed) for arm in question.arms for seed in self.table.seeds):
                asked = found.setdefault(self.job(arm, seed, rates).digest, set())
                asked |= {question.metric} - {"diverged"}
        return found

    def fine_tuning_jobs(self, rates: Mapping[str, float], arms: Sequence[str] | None = None) -> list[Job]:
        """The runs that choose rates of fine-tuning, each behind the run that it goes on with.

        Args:
            rates: learning rates by arm that trains from scratch; none where the table has no grid of them.
            arms: only these.
        """
        grid = self.table.fine_tuning_rates
        if grid is None:
            return []
        every = ((seed, rate, arm) for seed in grid.seeds for rate in grid.values for arm in self.fine_tuned(arms))
        return _each_behind_its_own(self.job(arm, seed, {**rates, arm: rate}) for seed, rate, arm in every)

    def jobs(
        self, rates: Mapping[str, float], arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> list[Job]:
        """The runs of the table, seed by seed; each stands behind the run that it is of.

        Args:
            rates: learning rates by arm that trains; none where the table has no grid.
            arms: only these.
            seeds: only these.
        """
        return _each_behind_its_own(
            self.job(arm, seed, rates)
            for seed in (self.table.seeds if seeds is None else seeds)
            for arm in (self.table.arms if arms is None else arms)
        )


def _sorted(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))


def _each_behind_its_own(jobs: Iterable[Job]) -> list[Job]:
    """Each once, behind the run that it is of."""
    found: dict[str, Job] = {}
    for job in jobs:
        for each in (*job.needs, job):
            found.setdefault(each.digest, each)
    return list(found.values())


def _configured(
    recipe: Recipe, config: RunConfig, settings: Mapping[str, Any], configure: Configure, where: str
) -> RunConfig:
    try:
        options = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
        ]
        return configure(recipe, config, options) if options else config
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_seeds(table: AblationTable) -> None:
    """Seeds are the table's, and no run of an arm is that of another pair."""
    places = {"settings": table.settings, **{f"arms.{arm.name}.settings": arm.settings for arm in table.arms.values()}}
    for place, settings in places.items():
        for key in _SEEDS:
            if key in settings:
                raise UserError(
                    f"{table.path}: {place}: {key} is given by the seeds of the table. Give seed_offset, or "
                    "order_offset, to an arm instead."
                )
    taken = {"of the table": {*table.seeds}}
    for key, grid in (("learning_rates", table.learning_rates), ("fine_tuning_rates", table.fine_tuning_rates)):
        taken[f"of {key}"] = set() if grid is None else {*grid.seeds}
    offsets: dict[int, str] = {}
    for arm in table.arms.values():
        for key, offset in (("seed_offset", arm.seed_offset), ("order_offset", arm.order_offset)):
            own = {seed + offset for seed in table.seeds}
            others = dict(taken)
            if key == "seed_offset":
                others |= {f"of {name}": {seed + other for seed in table.seeds} for other, name in offsets.items()}
            else:  # first weights tell the runs of other seeds apart
                others = {"of the table": taken["of the table"]}
            for whose, seeds in others.items() if offset else ():
                if shared := sorted(own & seeds):
                    raise UserError(
                        f"{table.path}: arms.{arm.name}.{key}: must lead to other seeds than those {whose}, or pairs "
                        f"have runs in common: {shared} are in both. Give a larger one, such as 1000."
                    )
        if arm.seed_offset and not arm.of:
            offsets.setdefault(arm.seed_offset, arm.name)


def _check_ladders(table: AblationTable, configs: Mapping[str, RunConfig], models: Mapping[str, nn.ModuleDict]) -> None:
    """The arms of a ladder differ in what makes their work: parameters, steps, or tokens of a step."""

    def size(arm: str) -> tuple[Any, ...]:
        tokens = tuple(task.tokens for task in vars(configs[arm].tasks).values())
        parameters = sum(parameter.numel() for parameter in models[arm].parameters())
        return parameters, configs[arm].train.max_steps, tokens

    for question in table.questions:
        sizes = {size(arm) for arm in question.ladder}
        if question.ladder and len(sizes) < FEWEST_SIZES:
            raise UserError(
                f"{table.path}: claims.{question.id}.ladder: must have {FEWEST_SIZES} or more arms of different work: "
                f"{', '.join(question.ladder)} are of {len(sizes)}. Change their width, depth or steps."
            )


def _model(
    recipe: Recipe, arm: Arm, config: RunConfig, models: Mapping[str, nn.ModuleDict], where: str
) -> nn.ModuleDict:
    """Network and heads of an arm without memory; refused is what a run would refuse only once it is its turn."""
    if not config.train.max_steps:
        raise UserError(f"{where}: train.max_steps must be given: minutes would make numbers depend on the machine.")
    try:
        config.train.check()
        config.evaluate.check()
        made = recipe.parts(config, RunText(config.data.vocab_size), "meta").named()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        check_taken(arm, made, config, models)
    except UserError as error:
        raise UserError(f"{where.removesuffix('settings')}{error}") from None
    return made
