"""An arm of a table: one way to make a model, from scratch or from the models of other arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moekit.ablation.part import Part
from moekit.errors import UserError, nearest

RATE = "train.learning_rate"

Fault = Callable[[str, str], UserError]
"""Makes the error of a key, from the key and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make a model, or to evaluate one.

    Attributes:
        name: what tables and plots call it.
        about: one line about it.
        settings: by dotted key, over those of the table.
        seed_offset: number added to every seed, for an arm that should not begin like the others.
        order_offset: number added to the seed of the order of the text alone; first weights stay those of the pair.
        of: the arm whose trained models this one evaluates under its own settings, or begins with; "" = it trains its
            own.
        prune: for an arm `of` another: options of the command prune, which is done before its models are evaluated, or
            gone on with.
        fine_tune: for an arm `of` another: the group `fine_tune` of the command finetune, by which its models are
            trained on under the arm's settings; None = they are not.
        aggregate: for an arm that fine-tunes: the arm whose experts are added to those of `of` before, under ``with``,
            and options of the command aggregate.
        distill: for an arm `of` another: the group `distill` of the command distill, by which its models teach this
            arm's; None = they do not.
        given_as: for an arm `of` another: the setting that takes the folder of its run, such as ``model.embeddings``;
            "" = none does.
    """

    name: str
    about: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed_offset: int = 0
    order_offset: int = 0
    of: str = ""
    prune: Mapping[str, Any] = field(default_factory=dict)
    fine_tune: Mapping[str, Any] | None = None
    aggregate: Mapping[str, Any] = field(default_factory=dict)
    distill: Mapping[str, Any] | None = None
    given_as: str = ""

    @property
    def trains(self) -> bool:
        """Whether its runs take steps of their own."""
        return self.begins or self.fine_tune is not None

    @property
    def begins(self) -> bool:
        """Whether its models begin with first weights and the settings of the table, whatever they take of others."""
        return not self.of or self.distill is not None or bool(self.given_as)

    @property
    def others(self) -> list[str]:
        """The arms whose models it needs."""
        return [name for name in (self.of, str(self.aggregate.get("with", ""))) if name]


def read_arm(name: str, part: Part) -> Arm:
    """The arm in a part of a file.

    Raises:
        UserError: a key is unknown or of the wrong kind.
    """
    arm = Arm(
        name=name,
        about=part.text("about", ""),
        settings=part.settings("settings"),
        seed_offset=part.whole("seed_offset", 0, at_least=0),
        order_offset=part.whole("order_offset", 0, at_least=0),
        of=part.text("of", ""),
        prune=part.mapping("prune"),
        fine_tune=part.mapping("fine_tune") if "fine_tune" in part.values else None,
        aggregate=part.mapping("aggregate"),
        distill=part.mapping("distill") if "distill" in part.values else None,
        given_as=part.text("given_as", ""),
    )
    part.end()
    for key in ("prune", "aggregate"):
        if key in part.values and not getattr(arm, key):
            raise part.fault(key, f"is empty: give the options of the command {key}, or leave it out")
    return arm


def check_arm(arm: Arm, arms: Mapping[str, Arm], fault: Fault, *, grid: bool, fine_tuning_grid: bool) -> None:
    """Make sure that what an arm says fits together.

    Args:
        arm: the arm.
        arms: all of the table.
        fault: makes the error of a key.
        grid: whether the table has a grid of learning rates.
        fine_tuning_grid: whether it has one for arms that fine-tune.

    Raises:
        UserError: naming the arm and the key.
    """
    where = f"arms.{arm.name}"
    begin = [name for name, other in arms.items() if not other.of]
    for key, name in (("of", arm.of), ("aggregate.with", arm.aggregate.get("with") if arm.aggregate else "")):
        if name != "" and name not in begin:
            raise fault(f"{where}.{key}", f"must name an arm that trains from scratch: got {name!r}. "
                        f"{nearest(str(name), begin)}")  # fmt: skip
    ways = {"prune": arm.prune, "fine_tune": arm.fine_tune is not None, "distill": arm.distill is not None,
            "given_as": arm.given_as}  # fmt: skip
    given = [key for key, value in ways.items() if value]
    for key in given:
        if not arm.of:
            raise fault(f"{where}.{key}", f"is for an arm that says whose models it {_WHAT_FOR[key]}: give `of` too")
    if len(given) > 1 and given != ["prune", "fine_tune"]:
        one, other = given[:2]
        raise fault(f"{where}.{one}", f"a model is {_WORDS[one]} or {_WORDS[other]}, not both: leave one out")
    steps = [key for key in arm.settings if key.startswith("train.")]
    if arm.of and not given and steps:
        raise fault(
            f"{where}.settings.{steps[0]}",
            f"is of training, which an arm that evaluates the models of {arm.of!r} does not do: leave it out, or give "
            "`fine_tune`",
        )
    if arm.prune and arm.settings and arm.fine_tune is None:
        raise fault(f"{where}.settings", "a pruned model is evaluated as it is: leave settings out")
    if arm.prune and arm.aggregate:
        raise fault(f"{where}.prune", "a model is pruned or joined to another, not both: leave one out")
    if arm.aggregate and arm.aggregate["with"] == arm.of:
        raise fault(f"{where}.aggregate.with", f"must name another arm than `of`: both are {arm.of!r}")
    if arm.aggregate and arm.fine_tune is None:
        raise fault(f"{where}.aggregate", "is for an arm that goes on with the result: give `fine_tune` too")
    for key, offset in (("seed_offset", arm.seed_offset), ("order_offset", arm.order_offset)):
        if arm.of and offset:
            raise fault(f"{where}.{key}", f"is of an arm that trains from scratch: this one is of {arm.of!r}")
    if arm.fine_tune is not None and not fine_tuning_grid and RATE not in arm.settings:
        raise fault(
            f"{where}.fine_tune",
            f"needs a learning rate: give fine_tuning_rates to the table, or {RATE} to the arm's settings",
        )
    if arm.of and arm.begins and grid:
        raise fault(
            f"{where}.{given[0]}",
            f"is for tables without a grid, of which these arms have no part: give {RATE} to the table's settings, and "
            "leave learning_rates out",
        )


_WHAT_FOR = {"prune": "prunes", "fine_tune": "goes on with", "distill": "learns from", "given_as": "is given"}
_WORDS = {"prune": "pruned", "fine_tune": "fine-tuned", "distill": "taught", "given_as": "given as a setting"}
