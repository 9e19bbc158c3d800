"""The command ablate."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from moekit.cli.command import Command, number, say
from moekit.errors import TrainingStoppedError, UserError
from moekit.shell import command_line
from moekit.wording import counted

RUNS = Path("runs/ablations")
"""Where runs go."""


def _options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "table",
        nargs="?",
        metavar="TABLE",
        help="table to run: RECIPE/TABLE, TABLE alone where one recipe has it, or the path of a YAML file",
    )
    parser.add_argument(
        "--list", action="store_true", help="list all tables: claims, arms and seeds, processor minutes, what is done"
    )
    parser.add_argument(
        "--claims",
        action="store_true",
        help="write docs/claims.md and what recipes' pages say of dense twins anew, from recipes/claims.yaml and the "
        "results in recipes/; nothing is run",
    )
    parser.add_argument(
        "--jobs",
        type=number(int, at_least=1),
        metavar="N",
        help="number of runs at the same time, each with one thread (default: one for each processor)",
    )
    parser.add_argument(
        "--seeds",
        type=number(int, at_least=0),
        nargs="+",
        metavar="SEED",
        help="make only the runs of these seeds of the table; a result is written once all seeds are there",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ARM",
        help="make only the runs of these arms; a result is written once all arms are there",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=RUNS,
        metavar="FOLDER",
        help="folder of the runs, which all tables share (default: runs/ablations)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for TABLE.json, TABLE.md and TABLE.svg (default: recipes/RECIPE/results/ablations, or "
        "results beside a file that lies elsewhere)",
    )


def _ablate(given: Namespace, console: Console) -> None:
    wanted = [given.table is not None, given.list, given.claims]
    if sum(wanted) != 1:
        raise UserError("ablate needs one of: a table to run, --list, or --claims. --help says more.")
    from moekit.ablation.session import (
        failed_runs,
        list_tables,
        run_table,
        write_claims,
    )  # a help text needs none of it
    from moekit.cli.recipes import reconfigured

    if given.list:
        list_tables(given.runs, reconfigured, console)
    elif given.claims:
        say(console, "\n".join(map(str, write_claims())))
    else:
        where, which = _where(given), _which(given)
        again = command_line("ablate", given.table, *where, *which)
        found = run_table(
            given.table, reconfigured, console, runs=given.runs, at_once=given.jobs or _processors(),
            seeds=given.seeds, only=given.only, out=given.out, again=again,
            whole=command_line("ablate", given.table, *where),
        )  # fmt: skip
        failed = failed_runs(found) if found else []
        if failed:
            name, said = failed[0]
            raise TrainingStoppedError(
                f"{counted(len(failed), 'run')} of the table failed, such as {name}: {said} The result is written "
                f"without. Logs are beside the folders of the runs, in {given.runs}. To try these again: {again}"
            )


def _where(given: Namespace) -> list[str]:
    """The options that say where runs are made and how many at once, as they were typed."""
    single = {"--jobs": given.jobs, "--runs": given.runs if given.runs != RUNS else None, "--out": given.out}
    return [word for option, value in single.items() if value is not None for word in (option, str(value))]


def _which(given: Namespace) -> list[str]:
    """The options that say which runs are made."""
    several = {"--seeds": given.seeds or (), "--only": given.only or ()}
    return [str(word) for option, values in several.items() if values for word in (option, *values)]


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


COMMAND = Command(
    "Run a table of an ablation, arms by paired seeds, and judge its claims by a written rule",
    _options,
    _ablate,
    "  moekit ablate --list                       tables, cost, and what is done\n"
    "  moekit ablate shazeer/balance_losses       run what is missing; Ctrl-C stops, the same command goes on\n"
    "  moekit ablate my/table.yaml --jobs 4       a table of yours\n"
    "  moekit ablate --claims                     docs/claims.md and recipes' pages from the results that are there",
)
