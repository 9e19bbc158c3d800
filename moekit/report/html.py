"""`write_report`: a run folder becomes one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from moekit.report import answers, experts, page, provenance, results, samples
from moekit.report.run_folder import read_run


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Reads the folder's files only, each of which may be missing; the page is self-contained (no network, no scripts),
    follows the reader's light or dark theme, and prints.

    Raises:
        UserError: if `run_dir` is not a run folder, or cannot be written to.
    """
    run = read_run(Path(run_dir))
    parts = {
        "scores": ("Quality", results.scores(run)),
        "answers": ("Answers", answers.section(run)),
        "losses": ("Losses", results.losses(run)),
        "experts": ("Experts", experts.experts(run)),
        "routing": ("Routing", experts.routing(run)),
        "samples": ("Samples", samples.samples(run)),
        "reproduce": ("Reproduce", provenance.reproduce(run)),
    }
    parts = {anchor: part for anchor, part in parts.items() if part[1]}
    links = "".join(f'<li><a href="#{anchor}">{title}</a></li>' for anchor, (title, _) in parts.items())
    html = (
        f'{results.headline(run)}\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f"<main>\n{chr(10).join(html for _, html in parts.values())}\n</main>\n"
        f"<footer>Made by moekit from the files of {page.text(run.path.resolve().name)}/.</footer>"
    )
    return page.write_text(run.path / "report.html", page.page(f"{run.name} · moekit", html))
