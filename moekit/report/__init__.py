"""Pictures and tables of a run, from the files of its folder alone.

`write_report` makes report.html, `terminal_summary` prints one screen, `write_comparison` sets runs side by side,
`results_markdown` is for committing. ``moekit report RUN`` does the same from a shell.

`figure` gives any drawing of a run's report, or of the routing of any module, as a figure of Matplotlib, by its name.

`figures` draws the routing of any module, without a run folder, and `RoutingReport` is a callback that writes a page
of it. `mechanism_figures` and `mechanism_table` show what `moekit.mechanisms` has found in a trace.

What is shown stands in the classes of `view`, which results, curves, experts, samples and comparison fill from run
folders. page.html, run.md and terminal lay it out; texts.toml holds the prose of the pages.
"""

from moekit.report.comparison import write_comparison
from moekit.report.mechanisms import mechanism_figures, mechanism_table
from moekit.report.named_figures import figure, figure_names
from moekit.report.own_module import RoutingReport, figures
from moekit.report.run import results_markdown, write_report
from moekit.report.terminal import terminal_summary

__all__ = [
    "RoutingReport",
    "figure",
    "figure_names",
    "figures",
    "mechanism_figures",
    "mechanism_table",
    "results_markdown",
    "terminal_summary",
    "write_comparison",
    "write_report",
]
