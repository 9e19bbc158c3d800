"""A run and its dense twin: the same text, seeds and steps, and the page that sets them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli.command import say
from moekit.cli.training import folder, test_and_report, train
from moekit.errors import UserError
from moekit.runs.plain import as_plain, differences, with_setting
from moekit.terminal import Terminal

if TYPE_CHECKING:
    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe

PAGE = "twin.html"
"""In the folder of the sparse run."""
_DENSE = "_dense"
_SEEDS = ("data.seed", "data.order_seed")
_DECIDE = ("train.max_steps", "train.learning_rate", "train.optimizer")
"""Settings of training that a known result is of."""


def train_with_twin(recipe: Recipe, config: RunConfig, given: Any) -> None:
    """Train, test and report a run and then its twin, each in a folder of its own, and compare them.

    Raises:
        UserError: the variant has no twin, or several processes would train.
    """
    twin, changes = _twin(recipe, given.variant)
    if config.train.devices * config.train.num_nodes > 1:
        raise UserError(
            f"--twin trains two models one after the other in one process: got {config.train.devices} devices and "
            f"{config.train.num_nodes} nodes. Run {given.variant} and {twin} by two commands, then compare them."
        )
    config = _paired(config, given)
    other = config
    for key, value in changes.items():
        other = with_setting(other, key, value)
    second = given.clone()
    second.variant, second.out = twin, given.out and f"{given.out.rstrip('/')}-dense"
    folders = [folder(recipe, each.variant, each.out, "smoke" if each.smoke else "") for each in (given, second)]
    if not (given.resume or given.overwrite):  # before the first is trained
        from moekit.runs.run import Run

        for path in folders:
            Run(path).require_free(resume=False, overwrite=False)
    for settings, options in ((config, given), (other, second)):
        test_and_report(*train(recipe, settings, options))
    _compare(recipe, given.variant if _as_published(recipe, given.variant, config) else None, folders)


def _twin(recipe: Recipe, variant: str) -> tuple[str, dict[str, Any]]:
    """The name of a variant's twin, and its settings that differ, by dotted key."""
    name = f"{variant}{_DENSE}"
    if name not in recipe.variants:
        have = [known for known in recipe.variants if f"{known}{_DENSE}" in recipe.variants]
        raise UserError(
            f"--twin needs a variant with a dense twin: {recipe.name} has none of {variant}. "
            f"Give --variant {' or '.join(have)}."
            if have
            else f"--twin needs a variant with a dense twin: {recipe.name} has none."
        )
    plain = (as_plain(recipe.variants[each].config) for each in (variant, name))
    return name, {key: new for key, (_, new) in differences(*plain).items()}


def _paired(config: RunConfig, given: Any) -> RunConfig:
    """Settings by which two runs differ in their models alone: no clock ends one, and first weights are paired."""
    paired: dict[str, Any] = {}
    if config.train.max_steps and not given.chose("train.max_minutes"):
        paired["max_minutes"] = 0.0
    if not given.chose("train.init_by_name"):
        paired["init_by_name"] = True
    return config.changed(train=paired)


def _as_published(recipe: Recipe, variant: str, config: RunConfig) -> bool:
    """Whether nothing is other than in the variant of which results are known, but for seeds and for how it is run."""
    variant_of, own = (as_plain(each) for each in (recipe.variants[variant].config, config))
    different = differences(variant_of, own, ("evaluate", "strategy", "data.cache", "data.num_workers", *_SEEDS))
    return not [key for key in different if not key.startswith("train.") or key in _DECIDE]


def _compare(recipe: Recipe, variant: str | None, folders: list[Path]) -> None:
    from moekit.ablation.pairs import known_pairs  # where they are used: a help text draws nothing
    from moekit.report import write_comparison

    known = known_pairs(recipe.name, variant) if variant else []
    page = write_comparison(folders, folders[0] / PAGE, known=known)
    say(Terminal(), "\n".join([f"side by side {page}", *known]))
