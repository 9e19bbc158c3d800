"""What `ablate` does: lists tables, runs one from where it stands to its result, and writes the page of claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Rows
from rich.text import Text

from moekit.ablation.beside import write_parts
from moekit.ablation.claims import claims_page, listed_words, read_claims
from moekit.ablation.kept import keep, restore
from moekit.ablation.measures import measure
from moekit.ablation.plan import Configure, Job, Plan
from moekit.ablation.processes import Commands, RunRecord, measured_minutes, run_all
from moekit.ablation.result import chosen_fine_tuning_rates, chosen_rates, read_result, result
from moekit.ablation.same_text import require_same_text
from moekit.ablation.table import RECIPES, AblationTable, find_table, read_table, table_files
from moekit.ablation.verdict import count_verdicts
from moekit.ablation.view import Progress, spoken_minutes
from moekit.atomic import require_writable, write_text
from moekit.errors import UserError, nearest
from moekit.lock import InUseError
from moekit.shell import command_line
from moekit.terminal import visible

CLAIMS = "claims.yaml"
"""Beside the recipes: all claims, whether a table asks them or not."""
KEPT = "runs"
"""Beside the results: the numbers of each run."""


def run_table(
    name: str,
    configure: Configure,
    console: Console,
    *,
    runs: Path,
    at_once: int,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    out: Path | None = None,
    commands: Commands | None = None,
    again: str = "",
    whole: str = "",
) -> dict[str, Any] | None:
    """Make the runs of a table that are missing, and its result once all are there.

    Args:
        name: of the table, or its file.
        configure: applies options to a configuration.
        console: where it is told.
        runs: the folder of all runs.
        at_once: processes.
        seeds: only these seeds of the table.
        only: only these arms.
        out: folder of the result; None = that of the recipe's results.
        commands: that make a run; None = ordinary runs.
        again: what a user types to go on; "" = the table's name alone.
        whole: what makes the runs that `seeds` and `only` leave out; "" = the table's name alone.

    Returns:
        The result; None where runs are left to be made.

    Raises:
        UserError: the table, an option or a setting is at fault, which is said before anything is run.
        KeyboardInterrupt: it was interrupted; the same command goes on.
    """
    plan = Plan.of(read_table(find_table(name)), configure)
    table, folder = plan.table, out or results_folder(plan.table.path)
    _check_choice(table, seeds, only)
    for path in (folder, folder / KEPT):
        require_writable(path / f"{table.path.stem}.json")
    _restore(plan, runs, folder)

    def make(jobs: Sequence[Job], what: str, asked: Mapping[str, set[str]]) -> None:
        restore(jobs, runs, folder / KEPT)
        require_same_text(jobs, runs)
        try:
            _make(jobs, plan, runs, at_once, console, commands, what, asked)
        finally:
            keep(jobs, runs, folder / KEPT)

    try:
        make(plan.tuning_jobs(only), "choosing learning rates", plan.tuning_metrics(only))
        rates = _rates(plan, runs, only)
        make(plan.fine_tuning_jobs(rates, only), "choosing rates of fine-tuning", {})
        rates |= _fine_tuning_rates(plan, rates, runs, only)
        make(plan.jobs(rates, only, seeds), "runs", plan.metrics(rates))
    except KeyboardInterrupt:
        _say(console, f"What has been done is kept. To go on: {again or command_line('ablate', name)}")
        raise
    left = _left(plan, runs)
    if left:
        _say(console, f"{len(left)} runs of the table are not done: no result yet. To make them: "
             f"{whole or command_line('ablate', name)}")  # fmt: skip
        return None
    from moekit.ablation.pages import write_result  # where it is used: a help text draws nothing

    found = result(plan, runs, _words())
    paths = write_result(found, folder)
    console.print(_verdicts(found))
    _say(console, "\n".join(map(str, paths)))
    return found


def failed_runs(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Arm and seed of each run of a result that broke, and what it said; one that diverged is a result."""
    return [
        (f"{name}, seed {seed}", one["said"])
        for name, arm in found["arms"].items()
        for seed, one in arm["runs"].items()
        if one["state"] == "failed"
    ]


def results_folder(path: Path) -> Path:
    """Where the result of a table goes: ``results/ablations`` of its recipe, else ``results`` beside the file."""
    folder = path.resolve().parent
    return folder.parent / "results" / "ablations" if folder.name == "ablations" else folder / "results"


def list_tables(runs: Path, configure: Configure, console: Console) -> None:
    """Print every table of the checkout: claims, arms and seeds, what its result says, and which runs lie here.

    A result is in the checkout, whoever measured it, and so are the numbers of kept runs, which are put among the runs
    of this machine; all others are only where they were made. While another process makes runs here, nothing is put
    among them, which is said.

    Raises:
        UserError: a table is at fault, or there are none.
    """
    files = table_files()
    if not files:
        raise UserError(
            "tables are in recipes/ of moekit's checkout, which this installation has not. Run one of yours by its "
            f"path: {command_line('ablate', 'TABLE.yaml')}"
        )
    words = {id: said["claim"] for id, said in _words().items()}
    measured, total, busy = measured_minutes(runs), 0.0, False
    for name, path in files.items():
        plan = Plan.of(read_table(path), configure)
        try:
            _restore(plan, runs, results_folder(path))
        except InUseError:
            busy = True
        cost = Estimate.of(plan, runs, measured)
        total += cost.minutes
        grid = len(_tuning(plan, runs)[0])
        rates = f", {grid} more for learning rates" if grid else ""
        missing = f"{cost.minutes:.0f} processor minutes for the others, {cost.basis}"
        left = "none missing" if cost.done == cost.runs else missing
        console.print(Text.assemble((name, "bold"), f"  {visible(plan.table.title)}"), soft_wrap=True)
        arms = f"{len(plan.table.arms)} arms x {len(plan.table.seeds)} seeds{rates}"
        _say(console, f"  {arms}; result: {_said_of(path)}")
        _say(console, f"  runs on this machine, in {runs}: {cost.done} of {cost.runs} done, {left}")
        for claim in plan.table.claims.values():
            _say(console, f"  {claim.id} ({claim.kind}): {claim.claim or words.get(claim.id, claim.hypothesis)}")
    _say(console, f"{total:.0f} processor minutes for all runs that are not on this machine; results that are there do "
         f"not need them. Run a table: {command_line('ablate', next(iter(files)))}")  # fmt: skip
    if busy:
        _say(console, f"Another ablate makes runs in {runs}: kept runs that are not there yet are counted as missing.")


class Estimate:
    """What a table costs yet.

    Attributes:
        runs: all of them, those that choose learning rates included.
        done: those that need not be made.
        minutes: processor minutes of the others.
        basis: "measured", where runs alike were, in this folder or for the committed result; else "estimated".
    """

    def __init__(self, runs: int, done: int, minutes: float, basis: str) -> None:
        self.runs, self.done, self.minutes, self.basis = runs, done, minutes, basis

    @classmethod
    def of(cls, plan: Plan, runs: Path, measured: Mapping[str, float]) -> Estimate:
        """Of a table; `measured` has minutes by `Job.kin`."""
        tuning, rates, known = _tuning(plan, runs)
        every = [*tuning, *plan.jobs(rates)]
        # Without chosen rates no run of the second part is known to be there.
        asked = {job.digest for job in (every if known else tuning)}
        left = [job for job in every if job.digest not in asked or not RunRecord.of(job.folder(runs)).final]
        earlier = _committed_minutes(plan)
        minutes, sure = 0.0, True
        for job in left:
            found = measured.get(job.kin, earlier.get(job.kin))
            sure &= found is not None
            minutes += plan.table.minutes if found is None else found
        return cls(len(every), len(every) - len(left), minutes, "measured" if sure else "estimated")


def write_claims(recipes: Path | None = None) -> list[Path]:
    """Write docs/claims.md of the checkout, and what recipes' pages say of dense twins; returns the paths.

    Raises:
        UserError: there is no list of claims, or it, a result, or a page is at fault.
    """
    folder = RECIPES if recipes is None else recipes
    if not (folder / CLAIMS).is_file():
        raise UserError(f"--claims needs moekit's checkout: there is no {folder / CLAIMS}.")
    path, results = folder.parent / "docs" / "claims.md", committed_results(folder)
    write_text(path, claims_page(read_claims(folder / CLAIMS), results))
    return [path, *write_parts(folder, results)]


def committed_results(recipes: Path) -> dict[str, dict[str, Any]]:
    """Results of the checkout by ``RECIPE/TABLE``."""
    found = (read_result(path) for path in sorted(recipes.glob("*/results/ablations/*.json")))
    return {each["table"]: each for each in found}


# -- parts of a table --------------------------------------------------------------------------------------------------


def _check_choice(table: AblationTable, seeds: Sequence[int] | None, only: Sequence[str] | None) -> None:
    for seed in seeds or ():
        if seed not in table.seeds:
            raise UserError(f"--seeds must be of the table: {seed} is none of {', '.join(map(str, table.seeds))}.")
    for arm in only or ():
        if arm not in table.arms:
            raise UserError(f"--only must name arms of the table: {arm!r} is none. {nearest(arm, table.arms)}")


def _restore(plan: Plan, runs: Path, results: Path) -> None:
    """Put the kept runs of a whole table among the runs, as far as its learning rates are known."""
    restore(plan.tuning_jobs(), runs, results / KEPT)
    restore(_tuning(plan, runs)[0], runs, results / KEPT)
    _, rates, known = _tuning(plan, runs)
    if known:
        restore(plan.jobs(rates), runs, results / KEPT)


def _tuning(plan: Plan, runs: Path) -> tuple[list[Job], dict[str, float], bool]:
    """All runs that choose rates, the rates by arm as far as these have ended, and whether all have.

    Those of fine-tuning begin with the rates chosen before; until these are known their number alone is right.
    """

    def ended(jobs: Sequence[Job]) -> bool:
        return all(RunRecord.of(job.folder(runs)).final for job in jobs)

    first, rates = plan.tuning_jobs(), dict[str, float]()
    if known := ended(first):
        rates = {arm: float(found["chosen"]) for arm, found in chosen_rates(plan, runs).items()}
    second = plan.fine_tuning_jobs(rates)
    if known and (known := ended(second)):
        found = chosen_fine_tuning_rates(plan, rates, runs)
        rates |= {arm: float(each["chosen"]) for arm, each in found.items()}
    return list({job.digest: job for job in (*first, *second)}.values()), rates, known


def _make(
    jobs: Sequence[Job],
    plan: Plan,
    runs: Path,
    at_once: int,
    console: Console,
    commands: Commands | None,
    what: str,
    asked: Mapping[str, set[str]],
) -> None:
    """Make the jobs that are left; `asked` are the metrics that the table asks of each, by digest."""
    left = [job for job in jobs if not RunRecord.of(job.folder(runs)).final]
    if not jobs:
        return
    minutes = _committed_minutes(plan) | measured_minutes(runs)
    progress = _Asking(runs, asked, plan.table, console, left, minutes, plan.table.minutes, at_once)
    about = f", {spoken_minutes(progress.minutes_left())}" if left else ""
    _say(console, f"{plan.table.name}, {what}: {len(jobs) - len(left)} of {len(jobs)} done{about}")
    if left:
        with progress.shown():
            run_all(jobs, runs, at_once=at_once, watcher=progress, commands=commands)


class _Asking(Progress):
    """Progress that looks for the metrics of the table in each run that ends.

    A metric that no run has would otherwise be noticed when all of them are made.

    Args:
        runs: the folder of all runs.
        asked: metrics of each run by digest.
        table: that asks.
        progress: arguments of `Progress`.
    """

    def __init__(self, runs: Path, asked: Mapping[str, set[str]], table: AblationTable, *progress: Any) -> None:
        super().__init__(*progress)
        self.runs, self.asked, self.table = runs, asked, table

    def end(self, job: Job, record: RunRecord) -> None:
        """Raise UserError if a run that is done has not what is asked of it."""
        super().end(job, record)
        for key in sorted(self.asked.get(job.digest, ())) if record.state == "done" else ():
            try:
                measure(job.folder(self.runs), key)
            except UserError as error:
                raise UserError(f"{self.table.path}: a metric that the table asks for is not there: {error}") from None


def _rates(plan: Plan, runs: Path, only: Sequence[str] | None) -> dict[str, float]:
    """Chosen learning rates of the arms that are run."""
    _require_ended(plan.tuning_jobs(only), runs)
    return {arm: float(found["chosen"]) for arm, found in chosen_rates(plan, runs, only).items()}


def _fine_tuning_rates(
    plan: Plan, rates: Mapping[str, float], runs: Path, only: Sequence[str] | None
) -> dict[str, float]:
    """Chosen rates of the arms that fine-tune, and are run; `rates` are those of the others."""
    _require_ended(plan.fine_tuning_jobs(rates, only), runs)
    return {arm: float(found["chosen"]) for arm, found in chosen_fine_tuning_rates(plan, rates, runs, only).items()}


def _require_ended(jobs: Sequence[Job], runs: Path) -> None:
    """Make sure that runs that choose learning rates have a result."""
    unfinished = [job for job in jobs if not RunRecord.of(job.folder(runs)).final]
    if unfinished:
        said = RunRecord.of(unfinished[0].folder(runs)).said
        raise UserError(
            f"{len(unfinished)} runs that choose learning rates have failed, as {unfinished[0].label}: {said} "
            f"Its log: {unfinished[0].folder(runs)}.log"
        )


def _left(plan: Plan, runs: Path) -> list[Job]:
    """Runs of the whole table that have not ended; one that failed, or is of one that did, has ended this time."""
    tuning, rates, known = _tuning(plan, runs)
    return [job for job in plan.jobs(rates) if not _has_ended(job, runs)] if known else tuning


def _has_ended(job: Job, runs: Path) -> bool:
    if RunRecord.of(job.folder(runs)).state != "unfinished":
        return True
    return any(RunRecord.of(other.folder(runs)).state in ("failed", "diverged") for other in job.needs)


def _committed_minutes(plan: Plan) -> dict[str, float]:
    """Minutes by `Job.kin` that the committed result of the table has."""
    path = results_folder(plan.table.path) / f"{plan.table.path.stem}.json"
    if not path.is_file():
        return {}
    by_arm = read_result(path)["made"]["minutes_by_arm"]
    return {plan.job(arm, plan.table.seeds[0]).kin: by_arm[arm] for arm in plan.table.arms if arm in by_arm}


def _words() -> dict[str, dict[str, str]]:
    """Of the claims of the checkout's list."""
    path = RECIPES / CLAIMS
    return listed_words(read_claims(path)) if path.is_file() else {}


def _said_of(path: Path) -> str:
    """The verdicts of a table's result, the seeds that they are of, and when it was measured."""
    stored = results_folder(path) / f"{path.stem}.json"
    if not stored.is_file():
        return "none yet"
    found = read_result(stored)
    counts = count_verdicts([claim["verdict"] for claim in found["claims"]])
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    when = f", measured on {date}" if (date := found["made"].get("date")) else ""  # former versions did not write it
    return f"{verdicts} (seeds {', '.join(map(str, found['seeds']))}{when})"


def _verdicts(found: Mapping[str, Any]) -> Rows:
    from moekit.ablation.pages import asked, ours

    rows = Rows(box=SIMPLE_HEAD)
    for name in ("claim", "asked", "measured, 95 % interval", "pairs", "verdict"):
        rows.add_column(name, overflow="fold")
    for claim in found["claims"]:
        words = [claim["id"], asked(claim), ours(claim), str(claim["pairs"]), claim["verdict"]]
        rows.add_row(*map(visible, words))
    if "none" not in (control := found["control"]):
        words = ["negative control", asked(control), ours(control), str(control["pairs"])]
        rows.add_row(*map(visible, words), "holds" if control["verdict"] == "reproduced" else "does not hold")
    return rows


def _say(console: Console, text: str) -> None:
    console.print(visible(text), highlight=False, markup=False, soft_wrap=True)
