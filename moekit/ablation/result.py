"""The result of a table: what every run measured, and what follows of it, as plain data for one JSON file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moekit.ablation.arm import Arm
from moekit.ablation.comparison import PairedDifferences
from moekit.ablation.ladder import Factor, bounds, compute_factor, log_factors, why_no_measure
from moekit.ablation.measures import COSTS, MECHANISMS, costs, floor_of, measure
from moekit.ablation.plan import Job, Plan
from moekit.ablation.processes import RunRecord
from moekit.ablation.table import AblationTable, LearningRates, TestedClaim
from moekit.ablation.verdict import Evidence, Judged, judge
from moekit.environment import environment
from moekit.errors import UserError
from moekit.stored import parse_json

VERSION = 1
"""Of the files."""

_SAME = 0.02
"""Relative difference up to which arms count as matched."""


def chosen_rates(plan: Plan, runs: Path, arms: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """By arm that trains from scratch the learning rate that was chosen, and what each rate came to.

    The rate with the least mean over the grid's seeds is taken, the smaller one of equals; a run that diverged counts
    as the worst.

    Args:
        plan: the table, whose runs of the grid have all ended.
        runs: the folder of its runs.
        arms: only those whose models these ask for; None = all.

    Raises:
        UserError: all rates of an arm diverged, or the metric is none.
    """
    return _chosen(plan, plan.table.learning_rates, plan.trained(arms), {}, runs)


def chosen_fine_tuning_rates(
    plan: Plan, rates: Mapping[str, float], runs: Path, arms: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """The same of the arms that fine-tune; `rates` are those of the arms that train from scratch."""
    return _chosen(plan, plan.table.fine_tuning_rates, plan.fine_tuned(arms), rates, runs)


def _chosen(
    plan: Plan, grid: LearningRates | None, arms: Sequence[str], others: Mapping[str, float], runs: Path
) -> dict[str, dict[str, Any]]:
    if grid is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        values: dict[float, list[float | None]] = {}
        for rate in sorted(grid.values):
            folders = [plan.job(arm, seed, {**others, arm: rate}).folder(runs) for seed in grid.seeds]
            values[rate] = [
                measure(folder, grid.metric) if RunRecord.of(folder).state == "done" else None for folder in folders
            ]
        whole = {
            rate: sum(x for x in got if x is not None) / len(got) for rate, got in values.items() if None not in got
        }
        if not whole:
            raise UserError(f"{plan.table.path}: every learning rate of the grid diverged or failed for the arm {arm}.")
        best = min(whole, key=whole.__getitem__)
        found[arm] = {
            "chosen": best,
            "on_edge": len(values) > 1 and best in (min(values), max(values)),
            "tried": {repr(rate): got for rate, got in values.items()},
        }
    return found


def result(plan: Plan, runs: Path, words: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """The result of a table whose runs have all ended.

    Args:
        plan: the table.
        runs: the folder of its runs.
        words: of claims by id, for those that the table does not give: `claim`, `paper`, `section`, `published`.

    Returns:
        Plain data. All but what is below ``made`` is the same for whoever makes the same runs.

    Raises:
        UserError: a run lacks a number that a claim asks for.
    """
    table = plan.table
    rates = chosen_rates(plan, runs)
    chosen = {arm: float(found["chosen"]) for arm, found in rates.items()}
    fine_tuning = chosen_fine_tuning_rates(plan, chosen, runs)
    chosen |= {arm: float(found["chosen"]) for arm, found in fine_tuning.items()}
    jobs = {arm: {seed: plan.job(arm, seed, chosen) for seed in table.seeds} for arm in table.arms}
    measured = {arm: {seed: _run(table, arm, job, runs) for seed, job in found.items()} for arm, found in jobs.items()}
    evidence = {q.id: _evidence(q, measured, table.seeds) for q in table.claims.values()}
    control, controlled = None, ""
    if table.control is not None:
        shown = _evidence(table.control, measured, table.seeds)
        judged = judge({"control": shown})["control"]
        controlled = "" if judged.verdict == "reproduced" else judged.why.rstrip(".")
        control = _answer(table, table.control, shown, judged, measured, {})
    verdicts = judge(evidence, controlled)
    return {
        "version": VERSION,
        "table": table.name,
        "title": table.title,
        "recipe": table.recipe,
        "variant": table.variant,
        "settings": dict(table.settings),
        "seeds": list(table.seeds),
        "matched": list(table.matched),
        "learning_rates": _grid(table.learning_rates, rates),
        **({"fine_tuning_rates": _grid(grid, fine_tuning)} if (grid := table.fine_tuning_rates) else {}),
        "arms": {
            arm: {
                "about": made.about,
                "settings": dict(made.settings),
                "of": made.of or None,
                "prune": dict(made.prune) or None,
                **_taken(made),
                "seed_offset": made.seed_offset,
                "learning_rate": jobs[arm][table.seeds[0]].config.train.learning_rate,
                "costs": _mean_costs(measured[arm]),
                "runs": {str(seed): run for seed, run in measured[arm].items()},
            }
            for arm, made in table.arms.items()
        },
        "claims": [
            _answer(table, q, evidence[q.id], verdicts[q.id], measured, (words or {}).get(q.id, {}))
            for q in table.claims.values()
        ],
        "control": control if control is not None else {"none": table.no_control},
        "made": _made(plan, jobs, chosen, runs),
    }


def _taken(arm: Arm) -> dict[str, Any]:
    """What an arm says of the models of others beside whose they are, as far as it does."""
    groups = {"fine_tune": arm.fine_tune, "distill": arm.distill, "aggregate": arm.aggregate or None}
    found: dict[str, Any] = {name: dict(group) for name, group in groups.items() if group is not None}
    rest = {"given_as": arm.given_as, "order_offset": arm.order_offset}
    return found | {name: value for name, value in rest.items() if value}


def comparable(found: Mapping[str, Any]) -> str:
    """What two results of the same runs have in common, as text: all but when, where and how fast it was made."""
    return json.dumps({key: value for key, value in found.items() if key != "made"}, sort_keys=True)


def read_result(path: Path) -> dict[str, Any]:
    """A result.

    Raises:
        UserError: it is none, or of a later version.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"it is of version {found['version']}, not {VERSION}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} must be the result of a table: it cannot be read ({error}).") from None
    return dict(found)


# -- one run -----------------------------------------------------------------------------------------------------------


def _run(table: AblationTable, arm: str, job: Job, runs: Path) -> dict[str, Any]:
    """State, digest, numbers and costs of a run."""
    folder = job.folder(runs)
    record = RunRecord.of(folder)
    found: dict[str, Any] = {"digest": job.digest, "state": record.state}
    wanted = {q.metric for q in table.questions if arm in q.arms} - {"diverged"}
    if record.state != "done":
        return found | {"said": record.said, "metrics": {"diverged": 1.0} if record.state == "diverged" else {}}
    metrics = {"diverged": 0.0} | {key: measure(folder, key) for key in sorted(wanted)}
    floors = filter(None, map(floor_of, sorted(wanted)))
    for key in (*MECHANISMS, *floors):  # a dense model has no mechanisms, and most text no known floor
        try:
            metrics[key] = measure(folder, key)
        except UserError:
            continue
    return found | {"metrics": metrics, "costs": costs(folder)}


def _mean_costs(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over seeds; None where a run does not say, or none is done."""
    done = [run["costs"] for run in runs.values() if run["state"] == "done"]
    return {
        name: sum(each[name] for each in done) / len(done) if done and None not in [c[name] for c in done] else None
        for name in COSTS
    }


def _grid(grid: LearningRates | None, rates: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    return None if grid is None else {**asdict(grid), "arms": dict(rates)}


# -- one claim ---------------------------------------------------------------------------------------------------------

Measured = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""By arm and seed: what `_run` makes."""


def _evidence(question: TestedClaim, measured: Measured, seeds: Sequence[int]) -> Evidence:
    """The differences of a claim, by seed, of the runs that have its metric."""
    values = _values(question, measured, seeds)
    whole = [seed for seed in seeds if all(got[seed] is not None for got in values.values())]
    failed = sum(got[seed] is None for got in values.values() for seed in seeds)
    smallest, equality, origin, beyond = question.smallest, question.kind == "no difference", "zero", ""
    unmeasured = at_most = at_least = ""
    if question.kind == "compute factor":
        factors = _factors(question, measured, seeds)
        differences, (at_most, at_least) = log_factors(factors, question.smallest), bounds(factors)
        if whole:
            points = {arm: [_point(question, measured, arm, seed) for seed in whole] for arm in question.ladder}
            means = {
                arm: (statistics.fmean(work for work, _ in own), statistics.fmean(loss for _, loss in own))
                for arm, own in points.items()
            }
            unmeasured = why_no_measure(means)
        smallest = 0.0  # of the logarithm of the factor over the smallest of interest
        origin = beyond = f"a factor of {question.smallest:g}"
    else:
        side = 1.0 if question.direction == "higher" or equality else -1.0
        if question.kind == "mechanism":  # a bound of a difference is its smallest effect; its other side is zero's
            smallest, beyond = side * (question.bound - _origin(question)), f"{question.bound:g}"
            origin = f"{_origin(question):g}" if _origin(question) else "zero"
        differences = [side * (_effect(question, values, seed) - _origin(question)) for seed in whole]
    effect = PairedDifferences(differences) if len(differences) > 1 else None
    return Evidence(
        effect,
        smallest,
        equality,
        failed,
        unmeasured=unmeasured,
        at_most=at_most,
        at_least=at_least,
        origin=origin,
        beyond=beyond,
    )


def _values(question: TestedClaim, measured: Measured, seeds: Sequence[int]) -> dict[str, dict[int, float | None]]:
    found = {
        arm: {seed: measured[arm][seed]["metrics"].get(question.metric) for seed in seeds} for arm in question.arms
    }
    return {arm: _distances(got) for arm, got in found.items()} if question.kind == "spread" else found


def _distances(values: Mapping[int, float | None]) -> dict[int, float | None]:
    """How far each lies from their median, so that means of these are compared as Brown and Forsythe (1974) do."""
    middle = statistics.median([value for value in values.values() if value is not None] or [0.0])
    return {seed: None if value is None else abs(value - middle) for seed, value in values.items()}


def _effect(question: TestedClaim, values: Mapping[str, Mapping[int, float | None]], seed: int) -> float:
    """The metric of the arm, less that of what it is compared with."""
    value = values[question.arm][seed]
    other = values[question.against][seed] if question.against else 0.0
    assert value is not None
    assert other is not None
    return value - other


def _origin(question: TestedClaim) -> float:
    """Where the claimed side begins: at zero for a difference, at the bound for a number by itself."""
    is_difference = question.against and (question.bound >= 0) == (question.direction == "higher")
    return 0.0 if is_difference else question.bound


def _factors(question: TestedClaim, measured: Measured, seeds: Sequence[int]) -> dict[int, Factor]:
    """Compute-equivalent factors by seed, of the seeds whose runs all have the metric."""
    found = {}
    for seed in seeds:
        if any(measured[arm][seed]["metrics"].get(question.metric) is None for arm in question.arms):
            continue
        ladder = [_point(question, measured, arm, seed) for arm in question.ladder]
        try:
            found[seed] = compute_factor(ladder, *_point(question, measured, question.arm, seed))
        except ValueError as error:
            raise UserError(f"{question.id}: {error} Change the width, depth or steps of its arms.") from None
    return found


def _bounds(factors: Mapping[int, Factor]) -> dict[str, int]:
    """In how many pairs the factor is a bound, by which."""
    found = [factor.bound for factor in factors.values()]
    return {bound: found.count(bound) for bound in ("at least", "at most") if bound in found}


def _point(question: TestedClaim, measured: Measured, arm: str, seed: int) -> tuple[float, float]:
    """Work and metric of a run."""
    run = measured[arm][seed]
    if not run["costs"]["work"]:
        raise UserError(f"a compute factor needs the work of every run: that of {arm}, seed {seed}, is not known.")
    return run["costs"]["work"], run["metrics"][question.metric]


def _answer(
    table: AblationTable,
    question: TestedClaim,
    evidence: Evidence,
    judged: Judged,
    measured: Measured,
    words: Mapping[str, Any],
) -> dict[str, Any]:
    """All that is said of a claim: its words, its numbers, its verdict."""
    own = {name: getattr(question, name) for name in ("claim", "paper", "section", "published")}
    said = {name: value or words.get(name, "") for name, value in own.items()}
    found: dict[str, Any] = {"id": question.id, **said, "kind": question.kind, "hypothesis": question.hypothesis}
    found |= {"metric": question.metric, "arm": question.arm, "against": question.against or None}
    found |= {"direction": None if evidence.equality else question.direction, "smallest": question.smallest}
    found |= {"bound": question.bound if question.kind == "mechanism" else None, "ladder": list(question.ladder)}
    values = _values(question, measured, table.seeds)
    found["means"] = {arm: _mean([v for v in got.values() if v is not None]) for arm, got in values.items()}
    found |= _numbers(question, evidence)
    if question.kind == "compute factor" and (counted := _bounds(_factors(question, measured, table.seeds))):
        found["bounds"] = counted
    found |= {"failed": evidence.failed, "p": judged.p, "adjusted_p": judged.adjusted_p}
    found |= {"verdict": judged.verdict, "why": judged.why, "not_matched": _not_matched(table, question, measured)}
    return found


def _numbers(question: TestedClaim, evidence: Evidence) -> dict[str, Any]:
    """Pairs, difference, deviation and interval in the metric's own unit; of a factor, the factor and its interval."""
    effect = evidence.effect
    if effect is None:
        return {"pairs": 0, "difference": None, "deviation": None, "interval": None}
    low, high = effect.interval()
    if question.kind == "compute factor":
        mean, low, high = (question.smallest * math.exp(x) for x in (effect.mean, low, high))
        return {"pairs": len(effect.differences), "difference": mean, "deviation": None, "interval": [low, high]}
    side = 1.0 if question.direction == "higher" or evidence.equality else -1.0
    ends = sorted(side * end + _origin(question) for end in (low, high))
    return {
        "pairs": len(effect.differences),
        "difference": side * effect.mean + _origin(question),
        "deviation": effect.deviation,
        "interval": ends,
    }


def _not_matched(table: AblationTable, question: TestedClaim, measured: Measured) -> list[str]:
    """What the table says is matched in the arms of a claim, and is not, in words."""
    if not question.against:
        return []
    one, other = (_mean_costs(measured[arm]) for arm in (question.arm, question.against))
    found = []
    for name in table.matched:
        if name == "time":  # is measured, on a machine that others use: said, and not compared
            continue
        a, b = one[name], other[name]
        if a is None or b is None:
            found.append(f"{name} is not known")
        elif abs(a - b) > _SAME * max(abs(a), abs(b)):
            found.append(f"{name}: {a:.4g} and {b:.4g}")
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _made(plan: Plan, jobs: Mapping[str, Mapping[int, Job]], rates: Mapping[str, float], runs: Path) -> dict[str, Any]:
    """When, where and how fast: nothing of it is compared."""
    grid = {job.digest: job for job in (*plan.tuning_jobs(), *plan.fine_tuning_jobs(rates))}
    every = {job.digest: job for found in jobs.values() for job in found.values()} | grid
    minutes = {digest: RunRecord.of(job.folder(runs)).minutes for digest, job in every.items()}
    here = environment()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "minutes": sum(minutes.values()),
        "minutes_by_arm": {
            arm: sum(minutes[job.digest] for job in found.values()) / len(found) for arm, found in jobs.items()
        },
        "environment": {key: value for key, value in here.items() if key not in ("command", "torch_threads")},
        "commits": sorted({_commit(job.folder(runs)) for job in every.values()} - {""}),
    }


def _commit(folder: Path) -> str:
    """The commit that a run's environment.json names, with a plus where files were changed since."""
    try:
        found = parse_json((folder / "environment.json").read_text(encoding="utf-8")).get("commit") or {}
        return f"{found['id']}{'+' if found['changed'] else ''}" if "id" in found else ""
    except (OSError, ValueError, AttributeError, KeyError):
        return ""
