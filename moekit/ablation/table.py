"""A table of an ablation: its arms, seeds and claims, written down before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import moekit
from moekit.ablation.arm import Arm, check_arm, read_arm
from moekit.ablation.ladder import FEWEST_SIZES
from moekit.ablation.part import Part
from moekit.errors import UserError, nearest
from moekit.runs.recipe import find_recipe
from moekit.runs.yaml_file import read_mapping

Kind = Literal["better", "no difference", "mechanism", "within checkpoint", "compute factor", "spread"]
Direction = Literal["higher", "lower"]
Matched = Literal["work", "parameters", "tokens", "time"]

_FEWEST_TO_SCATTER = 3

RECIPES = Path(moekit.__file__).parent.parent / "recipes"
"""Tables by name lie below it, ``NAME/ablations/TABLE.yaml``, in a checkout; an installed package has none."""


@dataclass(frozen=True, kw_only=True)
class TestedClaim:
    """A claim, or what the negative control must show, as something that numbers answer.

    Attributes:
        id: of the claim in recipes/claims.yaml, or one of your own.
        kind: how it is answered.
        hypothesis: what is expected here and why, written before the run.
        metric: key of a number in a run's summary.json, or the name of a column of metrics.csv; or a sum of such.
        arm: what the claim is about.
        against: what it is compared with; "" for a mechanism that is a number beyond a bound by itself.
        direction: which side of `against`, or of the bound, the claim places the arm on.
        smallest: the smallest effect of interest; for no difference the margin, for a compute factor the factor.
        bound: for a mechanism: the number.
        ladder: for a compute factor: the arms that are dense models of several sizes.
        claim, paper, section, published: the sentence in our words, whose it is, where it stands and the paper's
            number, for a claim that is not in recipes/claims.yaml.
    """

    id: str
    kind: Kind
    hypothesis: str
    metric: str
    arm: str
    against: str = ""
    direction: Direction = "lower"
    smallest: float = 0.0
    bound: float = 0.0
    ladder: Sequence[str] = ()
    claim: str = ""
    paper: str = ""
    section: str = ""
    published: str = ""

    @property
    def arms(self) -> list[str]:
        """All arms that answer it."""
        return [name for name in (self.arm, self.against, *self.ladder) if name]


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """The grid of learning rates that every arm that trains is tried on.

    Attributes:
        values: the rates.
        seeds: of these runs; none of them is a seed of the table.
        metric: of validation; the rate with the least mean is taken.
    """

    values: Sequence[float]
    seeds: Sequence[int]
    metric: str


@dataclass(frozen=True, kw_only=True)
class AblationTable:
    """What a file of ablations/ says.

    Attributes:
        path: the file.
        title: one line.
        recipe: its name.
        variant: the variant whose settings are the base.
        settings: of all arms by dotted key, over those of the variant.
        seeds: of the runs of each arm, in pairs across arms.
        matched: what is the same in the arms of a claim.
        minutes: the estimate of processor minutes for a run, for who has no measured ones.
        learning_rates: the grid of arms that begin from scratch; None = these train at the settings' own rate.
        fine_tuning_rates: that of arms that fine-tune; None = each gives its own rate.
        arms: by name.
        claims: by id.
        control: the negative control; None only where `no_control` says why.
        no_control: why there is none.
    """

    path: Path
    title: str
    recipe: str
    variant: str
    settings: Mapping[str, Any]
    seeds: Sequence[int]
    matched: Sequence[Matched]
    minutes: float
    learning_rates: LearningRates | None
    fine_tuning_rates: LearningRates | None
    arms: Mapping[str, Arm]
    claims: Mapping[str, TestedClaim]
    control: TestedClaim | None
    no_control: str

    @property
    def name(self) -> str:
        """``RECIPE/TABLE``."""
        return f"{self.recipe}/{self.path.stem}"

    @property
    def questions(self) -> list[TestedClaim]:
        """The claims and the control."""
        return [*self.claims.values(), *([self.control] if self.control else [])]


# -- where tables are --------------------------------------------------------------------------------------------------


def table_files(recipes: Path | None = None) -> dict[str, Path]:
    """The tables of the checkout by ``RECIPE/TABLE``; none where the package is installed without it."""
    folder = RECIPES if recipes is None else recipes
    return {f"{path.parent.parent.name}/{path.stem}": path for path in sorted(folder.glob("*/ablations/*.yaml"))}


def find_table(given: str, recipes: Path | None = None) -> Path:
    """The file of a table by path, by ``RECIPE/TABLE``, or by ``TABLE`` where only one recipe has it.

    Raises:
        UserError: there is none.
    """
    path = Path(given)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path} must be the file of a table: there is no such file.")
        return path
    known = table_files(recipes)
    named = [path for name, path in known.items() if given in (name, name.partition("/")[2])]
    if len(named) == 1:
        return named[0]
    if not known:
        raise UserError(
            f"{given!r} is no file, and tables by name are in recipes/ of moekit's checkout, which this installation "
            "has not. Give the path of a table: TABLE.yaml."
        )
    if named:
        several = ", ".join(name for name, path in known.items() if path in named)
        raise UserError(f"{given!r} is a table of several recipes: give one of {several}.")
    raise UserError(f"there is no table {given!r}. {nearest(given, known)}")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> AblationTable:
    """The table in a file.

    Raises:
        UserError: naming the file and the key: what is missing, unknown, of the wrong kind, or does not fit together.
    """
    top = Part(read_mapping(path, "a table"), str(path))
    folder = path.resolve().parent
    recipe = find_recipe(top.text("recipe", folder.parent.name if folder.name == "ablations" else None), str(path))
    variant = top.text("variant", next(iter(recipe.variants)))
    if variant not in recipe.variants:
        raise top.fault("variant", f"unknown variant {variant!r}. {nearest(variant, recipe.variants)}")
    arms = {name: read_arm(name, part) for name, part in top.parts("arms").items()}
    table = AblationTable(
        path=path,
        title=top.text("title"),
        recipe=recipe.name,
        variant=variant,
        settings=top.settings("settings"),
        seeds=top.seeds("seeds"),
        matched=[top.one_of("matched", value, Matched) for value in top.texts("matched")],
        minutes=top.number("minutes", above=0),
        learning_rates=_learning_rates(top.part("learning_rates")),
        fine_tuning_rates=_learning_rates(top.part("fine_tuning_rates")),
        arms=arms,
        claims=_claims(top),
        control=_question(found, "control") if (found := top.part("control")) else None,
        no_control=top.text("no_control", ""),
    )
    top.end()
    _check(table)
    return table


def _claims(top: Part) -> dict[str, TestedClaim]:
    found: dict[str, TestedClaim] = {}
    for part in top.listed("claims"):
        question = _question(part, part.text("id"))
        if question.id in found:
            raise part.fault("id", f"{question.id!r} is there twice")
        found[question.id] = question
    if not found:
        raise top.fault("claims", "a table needs at least one claim")
    return found


def _question(part: Part, id: str) -> TestedClaim:
    kind: Kind = part.one_of("kind", part.text("kind"), Kind)
    needs_bound, equality = kind == "mechanism", kind == "no difference"
    made = TestedClaim(
        id=id,
        kind=kind,
        hypothesis=part.text("hypothesis"),
        metric=part.text("metric"),
        arm=part.text("arm"),
        against=part.text("against", "" if kind in ("mechanism", "compute factor") else None),
        direction=part.one_of("direction", part.text("direction", "lower" if equality else None), Direction)
        if kind != "compute factor"
        else "higher",
        smallest=0.0 if needs_bound else part.number("smallest", **({"above": 0} if equality else {"at_least": 0})),
        bound=part.number("bound", at_least=-1e9) if needs_bound else 0.0,
        ladder=part.texts("ladder") if kind == "compute factor" else (),
        **{name: part.text(name, "") for name in ("claim", "paper", "section", "published")},
    )
    part.end()
    return made


def _learning_rates(part: Part | None) -> LearningRates | None:
    if part is None:
        return None
    values = part.numbers("values")
    if min(values) <= 0 or len(set(values)) < len(values):
        raise part.fault("values", f"must be different rates above 0: got {values}")
    found = LearningRates(values=values, seeds=part.seeds("seeds"), metric=part.text("metric"))
    part.end()
    return found


def _check(table: AblationTable) -> None:
    """What several keys say together."""

    def fault(key: str, why: str) -> UserError:
        return UserError(f"{table.path}: {key}: {why.removesuffix('.')}.")

    for arm in table.arms.values():
        grids = {"grid": table.learning_rates is not None, "fine_tuning_grid": table.fine_tuning_rates is not None}
        check_arm(arm, table.arms, fault, **grids)
    if table.fine_tuning_rates and all(arm.fine_tune is None for arm in table.arms.values()):
        raise fault("fine_tuning_rates", "are of arms that fine-tune: no arm has fine_tune")
    for question in table.questions:
        where = "control" if question is table.control else f"claims.{question.id}"
        for name in question.arms:
            if name not in table.arms:
                raise fault(where, f"unknown arm {name!r}. {nearest(name, table.arms)}")
        if question.against == question.arm:
            raise fault(f"{where}.against", f"must name another arm than `arm`: both are {question.arm!r}")
        if question.kind == "spread" and len(table.seeds) < _FEWEST_TO_SCATTER:
            raise fault(where, f"a spread needs {_FEWEST_TO_SCATTER} seeds or more: two lie equally far from their "
                        f"median, so that nothing could scatter; got {len(table.seeds)}")  # fmt: skip
        if question.kind == "within checkpoint":
            owners = {
                name if table.arms[name].trains else table.arms[name].of for name in (question.arm, question.against)
            }
            if len(owners) > 1:
                raise fault(
                    where, f"both arms must be of the same trained models: got those of {', '.join(sorted(owners))}"
                )
        if question.kind == "compute factor":
            if len(set(question.ladder)) < FEWEST_SIZES:
                raise fault(
                    f"{where}.ladder", f"must name {FEWEST_SIZES} or more arms: got {len(set(question.ladder))}"
                )
            if question.smallest <= 0:
                raise fault(f"{where}.smallest", f"must be a factor above 0: got {question.smallest:g}")
    for key, rates in (("learning_rates", table.learning_rates), ("fine_tuning_rates", table.fine_tuning_rates)):
        if rates is not None and (shared := sorted({*rates.seeds} & {*table.seeds})):
            raise fault(f"{key}.seeds", f"must be other seeds than those of the table: {shared} are in both")
    if (table.control is None) == (not table.no_control):
        raise fault("control", "give a negative control, or say under `no_control` why there is none")
