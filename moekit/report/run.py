"""`write_report` and `results_markdown`: a run folder becomes a view, and that a page or markdown."""

from __future__ import annotations

from pathlib import Path

from moekit.report import render
from moekit.report.agreement import agreement_section
from moekit.report.curves import losses, routing
from moekit.report.domains import domain_section
from moekit.report.ending import cut
from moekit.report.experts import experts
from moekit.report.health import findings
from moekit.report.predictions import main_task
from moekit.report.reading import read_run
from moekit.report.recall import recall_section
from moekit.report.results import about, answer_section, quality, tables, tiles
from moekit.report.run_folder import RunFolder, flat
from moekit.report.samples import samples
from moekit.report.view import Provenance, View
from moekit.report.wording import nearby
from moekit.shell import command_line, typed_again

_COMMANDS = ("command", "argv")
_UNFINISHED = "This run is not finished (it has no summary.json): numbers come from its metrics."
_TUNING = "This fine-tuning is not finished (results.json has no loss after it): numbers come from its metrics."


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Reads the folder's files only, each of which may be missing; the page is self-contained (no network, no scripts),
    follows the reader's light or dark theme, and prints.

    Raises:
        UserError: if `run_dir` is not a run folder, or cannot be written to.
    """
    run = read_run(Path(run_dir))
    return render.save(run.path / "report.html", render.html(run_view(run)))


def results_markdown(run_dir: Path, *, samples_per_direction: int = 2) -> str:
    """Summary, scores, routing and samples of a run as GitHub-flavoured markdown.

    Args:
        run_dir: the run folder.
        samples_per_direction: samples shown for each direction, or for each language of another task.

    Raises:
        UserError: if `run_dir` is not a run folder.
    """
    return render.markdown(run_view(read_run(Path(run_dir))), samples_per_direction=samples_per_direction)


def run_view(run: RunFolder) -> View:
    """Everything that is shown of a run."""
    was_cut = cut(run)
    return View(
        kind="moekit fine-tuning report" if run.tuned else "moekit run report",
        title=run.name,
        lead=about(run),
        tiles=tiles(run),
        sections=[
            s
            for s in (
                quality(run),
                answer_section(run),
                recall_section(run),
                agreement_section(run),
                domain_section(run),
                losses(run),
                experts(run),
                routing(run),
            )
            if s
        ],
        findings=findings(run),
        go_on=was_cut.command if was_cut else "",
        ended=[*filter(None, [run.stopped, was_cut.text if was_cut else ""])],
        notes=[] if run.summary else [_TUNING if run.tuned else _UNFINISHED],
        tables=tables(run),
        samples=None if run.tuned else samples(run),
        no_samples=run.task("translation" if run.translates else main_task(run).task).samples,
        samples_note=run.notes.get("samples.json", "samples.json holds no samples."),
        provenance=Provenance(
            _command(run),
            command_line("report", nearby(run.path)),
            run.config,
            {k: v for k, v in flat(run.environment).items() if k not in _COMMANDS},
            run.notes,
        ),
        footer=f"Made by moekit from the files of {run.path.resolve().name}/.",
    )


def _command(run: RunFolder) -> str:
    """The command that was typed, where it is recorded, else one that repeats the configuration; "" if neither."""
    command = next((run.environment[k] for k in _COMMANDS if run.environment.get(k)), None)
    if isinstance(command, list) and command:
        return typed_again([*map(str, command)])
    if isinstance(command, str) and command.strip():
        return command.strip()
    if not run.recipe:
        return ""
    parts = []
    if run.config.strip():
        parts += ["--config", nearby(run.path / "config.yaml")]
    elif run.variant:
        parts += ["--variant", run.variant]
    return command_line("run", run.recipe, *parts, "--out", f"{nearby(run.path)}-again")
