"""``run all --smoke``: the smoke tests of all recipes, one after another in this process."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from moekit.cli import recipes
from moekit.cli.command import execute, option_value, say
from moekit.errors import UserError
from moekit.runs.known import recipe_names
from moekit.runs.smoke import WARNING
from moekit.shell import command_line
from moekit.terminal import Terminal, visible

if TYPE_CHECKING:
    from moekit.runs.recipe import Recipe

ALL = "all"
"""What stands in the place of a recipe's name."""
_OF_ONE = {
    "--variant": "variants are of one recipe",
    "--config": "a configuration is of one recipe",
    **dict.fromkeys(
        ("--devices", "--nodes", "--train.devices", "--train.num_nodes"), "all recipes share this one process"
    ),
}
"""Options that it cannot take, and why."""


def run_all(arguments: Sequence[str]) -> int:
    """Make the smoke test of every recipe; returns the exit code: 0, 1 if one failed, or 2 if the options are wrong."""
    failed: list[str] = []
    return execute(lambda: failed.extend(_run_all(arguments))) or int(bool(failed))


def _run_all(arguments: Sequence[str]) -> list[str]:
    """The names of the recipes that failed."""
    if {"-h", "--help"} & set(arguments):
        _parser().print_help()
        return []
    given = _checked(arguments)
    from moekit.runs.recipe import find_recipe  # where it is used: a refusal needs none of it

    console = Terminal(file=sys.stdout)  # not what standard output is while a recipe runs
    found = [find_recipe(name, "run") for name in recipe_names()]
    recipes.reconfigured(found[0], found[0].default, given)  # refuses, once, what no recipe has
    failed, began = [], time.monotonic()
    say(console, WARNING)
    with contextlib.ExitStack() as stack:
        out = option_value(arguments, "--out")
        folder = Path(out or stack.enter_context(tempfile.TemporaryDirectory(prefix="moekit-smoke-")))
        if out is None and option_value(given, "--data.cache") is None:
            given += ["--data.cache", str(folder / "cache")]  # goes with them
        bar = stack.enter_context(_bar(console))
        task = bar.add_task("", total=len(found))
        for recipe in found:
            bar.update(task, description=recipe.name)
            before = time.monotonic()
            stages, fault = _smoke_test(recipe, [*given, "--out", str(folder / recipe.name)], folder / recipe.name)
            console.print(_line(recipe.name, stages, time.monotonic() - before, fault), soft_wrap=True)
            bar.update(task, advance=1)
            if fault is not None:
                failed.append(recipe.name)
    said = f"{len(failed)} of {len(found)} failed: {', '.join(failed)}" if failed else f"all {len(found)} passed"
    say(console, f"{said}, in {time.monotonic() - began:.0f} seconds{f'; the runs are in {out}' if out else ''}")
    return failed


def _checked(arguments: Sequence[str]) -> list[str]:
    """The options of each recipe, but for its folder.

    Raises:
        UserError: it is no smoke test, or an option is for one recipe only.
    """
    if "--smoke" not in arguments:
        raise UserError(
            f"run {ALL} needs --smoke: {command_line('run', ALL, '--smoke')}. Trained in full, the recipes take hours: "
            f"start each by its name, {command_line('run', 'NAME')}."
        )
    for option, why in _OF_ONE.items():
        if option_value(arguments, option) is not None:
            raise UserError(f"run {ALL} takes no {option}: {why}. Leave it out, or name a recipe.")
    out = option_value(arguments, "--out")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out must be a folder: {out} is a file.")
    given, words = [], iter(arguments)
    for word in words:
        if word == "--out":
            next(words)
        elif not word.startswith("--out="):
            given.append(word)
    return given


def _smoke_test(recipe: Recipe, options: Sequence[str], folder: Path) -> tuple[list[str], str | None]:
    """The stages that were passed, and what was at fault, if anything was; what the run says is kept to it.

    Raises:
        KeyboardInterrupt: it was interrupted, which ends all.
        SystemExit: another signal ended it, which ends all too.
    """
    said, errors, began = io.StringIO(), io.StringIO(), time.time()
    code = 1
    fault: str | None = None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            code = recipes.main(recipe, ["run", *options])
        except SystemExit as end:  # at a signal; Lightning's own, in a test, has no code of it
            if end.code == 130:
                raise KeyboardInterrupt from None
            raise
        except Exception as error:  # which is moekit's fault, and another recipe may do without
            fault = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    if code == 130:
        raise KeyboardInterrupt
    if code != 0 and fault is None:
        fault = next(reversed(errors.getvalue().strip().splitlines()), f"exit code {code}")
    if fault is not None and "Traceback" in errors.getvalue():
        print(visible(errors.getvalue()), file=sys.stderr)
    return _stages(folder, began), fault


def _stages(folder: Path, began: float) -> list[str]:
    """What a run has behind it, by what was written into its folder since it began."""
    from moekit.runs.run import REPORT, SUMMARY, Run

    run = Run(folder)
    left = {
        "trained": run.checkpoints / "last.ckpt",
        "validated": run.checkpoints / "best.ckpt",
        "tested": run.path / SUMMARY,
        "reported": run.path / REPORT,
    }
    return [stage for stage, path in left.items() if path.exists() and path.stat().st_mtime >= began - 1]


def _line(name: str, stages: Sequence[str], seconds: float, fault: str | None) -> Text:
    """What is said of a recipe that has ended."""
    mark = ("failed", "bold red") if fault is not None else ("passed", "green")
    line = Text.assemble(f"{name:<20}", mark, f"  {', '.join(stages) or 'nothing done':<36} {seconds:5.1f} s")
    return line if fault is None else line.append(f"  {visible(fault)}")


def _bar(console: Terminal) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command_line("run", ALL),
        usage=f"{command_line('run', ALL, '--smoke')} [--out FOLDER] [--key value ...]",
        description="Make the smoke test of every recipe, one after another in this process, and say of each which "
        "stages it passed and in how many seconds. A failure is said, and the others go on; the exit code is then 1.",
        allow_abbrev=False,
    )
    parser.add_argument("--smoke", action="store_true", help="do everything in seconds; needed here")
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder to keep the runs in, each in one of its name (default: none is kept)"
    )
    parser.add_argument("--key", metavar="VALUE", help="any setting that all recipes have, such as --train.accelerator")
    return parser
