"""The commands of ``python -m moekit.surgery`` that work on runs of recipes."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moekit.cli.recipes import reconfigured
from moekit.cli.surgery_command import SurgeryCommand
from moekit.errors import UserError
from moekit.report.pruning import write_curve
from moekit.runs.run import Run
from moekit.runs.surgery.curve import Recovery, pruning_curve, table
from moekit.runs.surgery.inspection import inspect, show
from moekit.runs.surgery.operations import (
    Result,
    aggregate_runs,
    change_run,
    merge_run,
    prune_run,
    split_run,
    upcycle_run,
)
from moekit.runs.surgery.utilisation import measured_load
from moekit.runs.surgery.writing import require_free, write_run
from moekit.surgery import choose_experts, count_kept, require_separable

_RUN = "folder of a run (its best checkpoint, else its last), or a checkpoint"


def _out(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the new run")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin at step 0 when training goes on (default: at the run's step, in its schedule)",
    )
    parser.add_argument("--fresh-optimizer", action="store_true", help="forget the optimizer's state")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    _config(parser)


def _config(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="FILE",
        help="config.yaml of a run with such a model, for checkpoints that do not hold their own",
    )


def _plain(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("--plain", action="store_true", help=f"leave experts and choices as they are: {what}")


def _of_part(parser: ArgumentParser) -> None:
    parser.add_argument("--language", default=None, help="utilisation of this language alone: a specialist")
    parser.add_argument("--task", default=None, help="utilisation in this task alone: a specialist")


def _write(result: Result, given: Namespace, console: Console) -> None:
    if given.fresh_optimizer:
        result = dataclasses.replace(result, slots=None)
    folder = write_run(result, given.out, restart=given.restart, overwrite=given.overwrite)
    layers = {layer.num_experts for layer in Run.load(folder.path).layers().values()}
    experts = f"{', '.join(str(n) for n in sorted(layers))} experts in a layer" if layers else "dense"
    count = sum(tensor.numel() for tensor in result.weights.values())
    recipe = f"python -m moekit.recipes.{result.run.recipe.name}"
    minutes = " --train.max_minutes MINUTES" if result.config.train.max_minutes and not given.restart else ""
    out = shlex.quote(str(folder.path))
    said = f"{result.said}\n" if result.said else ""
    console.print(
        f"{folder.path}: {count:,} parameters, {experts}\n{said}"
        f"test it      {recipe} test --out {out}\n"
        f"train it on  {recipe} fit --config {out}/config.yaml --out {out} --resume --train.max_steps STEPS{minutes}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


# -- inspect -------------------------------------------------------------------------------------------------------


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN", help=f"{_RUN}, or a file of weights")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    _config(parser)


def _inspect(given: Namespace, console: Console) -> None:
    found = inspect(given.path, given.config)
    if given.json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    else:
        show(found, console)


# -- aggregate -----------------------------------------------------------------------------------------------------


def _aggregate_options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=_RUN)
    parser.add_argument(
        "--shared",
        default="mean",
        help="what is no expert's: mean (default), or 1, 2, ...: that of this run. The mean makes sense for runs with "
        "a common ancestor or the same start (train.seed)",
    )
    parser.add_argument(
        "--gates",
        choices=["concatenate", "fresh"],
        default="concatenate",
        help="scores of the routers: rows side by side (default), or drawn anew",
    )
    parser.add_argument("--seed", type=int, default=0, help="of fresh gates")
    _plain(
        parser, "the paper's form, in which weights shrink under one softmax (default: what they lose is made up for)"
    )
    _out(parser)


def _aggregate(given: Namespace, console: Console) -> None:
    require_free(given.out, overwrite=given.overwrite)
    count = len(given.runs)
    if count < 2:
        raise UserError("aggregate needs two or more runs: got one.")
    if given.shared != "mean" and given.shared not in [str(n + 1) for n in range(count)]:
        raise UserError(f"--shared must be mean or the number of a run, 1 to {count}: got {given.shared}.")
    runs = [Run.load(run, given.config) for run in given.runs]
    shared_from = None if given.shared == "mean" else int(given.shared) - 1
    result = aggregate_runs(
        runs, shared_from=shared_from, fresh_gates=given.gates == "fresh", compensated=not given.plain, seed=given.seed
    )
    _write(result, given, console)


# -- prune ---------------------------------------------------------------------------------------------------------


def _amount(text: str) -> int | float:
    """``4``, ``0.5`` or ``50%``."""
    try:
        if text.endswith("%"):
            return float(text.removesuffix("%")) / 100
        return int(text) if text.strip("+-").isdecimal() else float(text)
    except ValueError:
        raise ArgumentTypeError(f"a number of experts (4), or a share of them (0.5 or 50%): got {text!r}") from None


def _prune_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help=_RUN)
    parser.add_argument(
        "--keep",
        type=_amount,
        required=True,
        help="experts to keep in each layer: a number (4), or a share (0.5, 50%%)",
    )
    parser.add_argument(
        "--by",
        choices=["utilisation", "reversed", "random"],
        default="utilisation",
        help="keep the most used (default), the least used, or random ones",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choice")
    _plain(parser, "also in a run that was aggregated or grown, where what made up for copies is taken back (default)")
    _of_part(parser)
    _out(parser)


def _prune(given: Namespace, console: Console) -> None:
    require_free(given.out, overwrite=given.overwrite)
    if given.by == "random" and (given.language or given.task):
        raise UserError("--language and --task say whose utilisation counts: leave them out with --by random.")
    run = Run.load(given.run, given.config)
    layers = run.layers()
    require_separable(layers, str(run.checkpoint))
    count_kept(layers, given.keep)  # before anything is measured
    load = None
    if given.by != "random":
        load = measured_load(run, language=given.language, task=given.task)
    kept = choose_experts(layers, given.keep, given.by, load=load, seed=given.seed)
    note = {"keep": given.keep, "by": given.by, "seed": given.seed, "language": given.language, "task": given.task}
    _write(prune_run(run, kept, compensated=not given.plain, **note), given, console)


# -- upcycle, merge, split, change ---------------------------------------------------------------------------------


def _upcycle_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help=f"{_RUN}; dense, or sparse to get more experts")
    parser.add_argument("--experts", type=int, required=True, help="experts of each sparse layer")
    parser.add_argument("--noise", type=float, default=0.0, help="on the copies, in standard deviations of the weights")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiplies what experts write; as many as experts keeps the function under a fresh top-1 softmax router",
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and routers")
    _plain(parser, "of a sparse run, whose copies share weights (default: what they lose is made up for)")
    _out(parser)


def _upcycle(given: Namespace, console: Console) -> None:
    require_free(given.out, overwrite=given.overwrite)
    if given.noise < 0:
        raise UserError(f"--noise must not be negative: got {given.noise:g}.")
    run = Run.load(given.run, given.config)
    result = upcycle_run(
        run, given.experts, noise=given.noise, scale=given.scale, compensated=not given.plain, seed=given.seed
    )
    _write(result, given, console)


def _merge_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help=_RUN)
    parser.add_argument("--by-load", action="store_true", help="weigh experts by their use (default: all alike)")
    _of_part(parser)
    _out(parser)


def _merge(given: Namespace, console: Console) -> None:
    require_free(given.out, overwrite=given.overwrite)
    if not given.by_load and (given.language or given.task):
        raise UserError("--language and --task say whose utilisation counts: give --by-load with them.")
    run = Run.load(given.run, given.config)
    load = measured_load(run, language=given.language, task=given.task) if given.by_load else None
    _write(merge_run(run, load), given, console)


def _split_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help=f"{_RUN}; of a recipe with a setting model.k")
    parser.add_argument(
        "--parts", type=int, required=True, help="parts of each expert; a token chooses so many times more"
    )
    parser.add_argument(
        "--whole-weights",
        action="store_true",
        help="of routers whose parts get the whole weight of their expert (sigmoid scores that are not scaled)",
    )
    _out(parser)


def _split(given: Namespace, console: Console) -> None:
    require_free(given.out, overwrite=given.overwrite)
    run = Run.load(given.run, given.config)
    _write(split_run(run, given.parts, divided=not given.whole_weights), given, console)


def _change_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help=_RUN)
    parser.add_argument(
        "--set",
        action="append",
        required=True,
        metavar="KEY=VALUE",
        help="a setting that needs no other weights, such as model.capacity_factor=2.0 or model.k=1; may be repeated",
    )
    _out(parser)


def _change(given: Namespace, console: Console) -> None:
    require_free(given.out, overwrite=given.overwrite)
    for item in given.set:
        if "=" not in item.lstrip("="):
            raise UserError(f"--set must be KEY=VALUE: got {item!r}.")
    run = Run.load(given.run, given.config)
    config = reconfigured(run.recipe, run.config, [f"--{item}" for item in given.set])
    _write(change_run(run, config), given, console)


# -- curve ---------------------------------------------------------------------------------------------------------


def _curve_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help=_RUN)
    parser.add_argument("--keep", type=_amount, nargs="+", default=[0.75, 0.5, 0.25], help="default: 75%% 50%% 25%%")
    parser.add_argument("--draws", type=int, default=20, help="random choices for each (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the first draw")
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS", help="train each model on for so many steps")
    parser.add_argument(
        "--recover-rate", type=float, default=0.0, help="peak learning rate then (default: a tenth of the run's)"
    )
    _of_part(parser)
    _config(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for pruning.json, .md and .svg")


def _curve(given: Namespace, console: Console) -> None:
    if given.draws < 0 or given.recover < 0:
        raise UserError("--draws and --recover must not be negative.")
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out must be a folder: {given.out} is a file.")
    run = Run.load(given.run, given.config)
    rate = given.recover_rate or run.config.train.learning_rate / 10
    bar = Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("validating", total=1 + len(given.keep) * (2 + given.draws))
        curve = pruning_curve(
            run,
            given.keep,
            draws=given.draws,
            recovery=Recovery(given.recover, rate) if given.recover else None,
            seed=given.seed,
            language=given.language,
            task=given.task,
            advance=lambda what: bar.update(task, advance=1, description=what),
        )
    write_curve(curve, given.out)
    console.print(table(curve), highlight=False, soft_wrap=True, markup=False)


COMMANDS: Mapping[str, SurgeryCommand] = {
    "inspect": SurgeryCommand(
        "show a checkpoint's layers, experts, sizes and use",
        _inspect_options,
        _inspect,
        "  python -m moekit.surgery inspect runs/zcode_m3-tiny\n"
        "  python -m moekit.surgery inspect runs/zcode_m3-tiny/checkpoints/last.ckpt --json",
    ),
    "aggregate": SurgeryCommand(
        "make one model with the experts of several",
        _aggregate_options,
        _aggregate,
        "  python -m moekit.surgery aggregate runs/one runs/two --out runs/both\n"
        "  python -m moekit.surgery aggregate runs/one runs/two --shared 1 --gates fresh --restart --out runs/both",
    ),
    "prune": SurgeryCommand(
        "keep some of the experts of each layer",
        _prune_options,
        _prune,
        "  python -m moekit.surgery prune runs/tiny --keep 50% --out runs/half\n"
        "  python -m moekit.surgery prune runs/tiny --keep 2 --language avl --out runs/avl",
    ),
    "upcycle": SurgeryCommand(
        "turn a dense model's feed-forwards into experts, or copy experts",
        _upcycle_options,
        _upcycle,
        "  python -m moekit.surgery upcycle runs/dense --experts 8 --noise 0.1 --scale 8 --restart --out runs/sparse",
    ),
    "merge": SurgeryCommand(
        "average experts to a dense model",
        _merge_options,
        _merge,
        "  python -m moekit.surgery merge runs/tiny --by-load --restart --out runs/dense",
    ),
    "split": SurgeryCommand(
        "cut experts into finer ones",
        _split_options,
        _split,
        "  python -m moekit.surgery split runs/shazeer-tiny --parts 2 --out runs/fine",
    ),
    "change": SurgeryCommand(
        "give the same weights other settings, such as a capacity",
        _change_options,
        _change,
        "  python -m moekit.surgery change runs/tiny --set model.capacity_factor=2.0 --out runs/roomy",
    ),
    "curve": SurgeryCommand(
        "measure quality against size: prune in several ways, validate each model",
        _curve_options,
        _curve,
        "  python -m moekit.surgery curve runs/tiny --out results\n"
        "  python -m moekit.surgery curve runs/tiny --keep 50% --draws 3 --recover 300 --out results",
    ),
}
