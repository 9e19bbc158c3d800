"""The commands that make new runs of trained ones, but for exchange with transformers, and what they share."""

from __future__ import annotations

import dataclasses
import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from moekit.cli.command import Command, say
from moekit.cli.recipes import reconfigured
from moekit.errors import UserError
from moekit.runs.run import Run
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

RUN = "folder of a run (its best checkpoint is used, else its last), or a checkpoint"

# -- options that several have -------------------------------------------------------------------------------------


def run_option(parser: ArgumentParser, more: str = "") -> None:
    """The run that is changed."""
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN + more)


def config_option(parser: ArgumentParser) -> None:
    """What says of which model a checkpoint is."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config.yaml of a run of the same model, for a checkpoint without its own configuration",
    )


def part_options(parser: ArgumentParser) -> None:
    """Whose utilisation counts."""
    for name, place in (("language", "for this language"), ("task", "in this task")):
        parser.add_argument(f"--{name}", help=f"measure expert utilisation only {place} (default: all validation text)")


def seed_option(parser: ArgumentParser, what: str) -> None:
    """The seed of what is drawn."""
    parser.add_argument("--seed", type=int, default=0, help=f"random seed of {what} (default: 0)")


def _output_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the new run")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="restart at step 0 when training continues (default: continue at the step and learning rate of the run)",
    )
    parser.add_argument("--fresh-optimizer", action="store_true", help="discard the state of the optimizer")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run in --out")
    config_option(parser)


def _plain_option(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("--plain", action="store_true", help=f"do not rescale experts and model.k: {what}")


def amount(text: str) -> int | float:
    """``4``, ``0.5`` or ``50%``.

    Raises:
        ArgumentTypeError: anything else.
    """
    try:
        if text.endswith("%"):
            return float(text.removesuffix("%")) / 100
        return int(text) if text.strip("+-").isdecimal() else float(text)
    except ValueError:
        raise ArgumentTypeError(f"a number of experts (4), or a share of them (0.5 or 50%): got {text!r}") from None


def _change(given: Namespace, console: Console, operation: Callable[[Run], Result]) -> None:
    """Write what the operation makes of the run of the options, unless something is in the way."""
    require_free(given.out, overwrite=given.overwrite)
    _write(operation(Run.load(given.run, given.config)), given, console)


def _write(result: Result, given: Namespace, console: Console) -> None:
    """Write the new run, and say what can be done with it."""
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
    say(
        console,
        f"{folder.path}: {count:,} parameters, {experts}\n{said}"
        f"test it      {recipe} test --out {out}\n"
        f"train it on  {recipe} fit --config {out}/config.yaml --out {out} --resume --train.max_steps STEPS{minutes}",
    )


# -- the commands --------------------------------------------------------------------------------------------------


def _aggregate_options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUN)
    parser.add_argument(
        "--shared",
        default="mean",
        help="weights outside the experts: the mean of all runs (default), or those of one run, by its number (1, 2, "
        "...). The mean makes sense for runs with a common ancestor or the same initial weights (train.seed)",
    )
    parser.add_argument(
        "--gates",
        choices=["concatenate", "fresh"],
        default="concatenate",
        help="router weights: concatenate those of all runs (default), or initialise them afresh",
    )
    seed_option(parser, "fresh router weights")
    _plain_option(parser, "the plain form of the paper, where one softmax over all experts shrinks their weights")
    _output_options(parser)


def _aggregate(given: Namespace, console: Console) -> None:
    require_free(given.out, overwrite=given.overwrite)
    count = len(given.runs)
    if count < 2:
        raise UserError("aggregate needs two or more runs: got one.")
    if given.shared != "mean" and given.shared not in [str(n + 1) for n in range(count)]:
        raise UserError(f"--shared must be mean or the number of a run, 1 to {count}: got {given.shared}.")
    result = aggregate_runs(
        [Run.load(run, given.config) for run in given.runs],
        shared_from=None if given.shared == "mean" else int(given.shared) - 1,
        fresh_gates=given.gates == "fresh",
        compensated=not given.plain,
        seed=given.seed,
    )
    _write(result, given, console)


AGGREGATE = Command(
    "Combine the experts of several runs into one model",
    _aggregate_options,
    _aggregate,
    "  python -m moekit aggregate runs/one runs/two --out runs/both\n"
    "  python -m moekit aggregate runs/one runs/two --shared 1 --gates fresh --restart --out runs/both",
)


def _prune_options(parser: ArgumentParser) -> None:
    run_option(parser)
    parser.add_argument(
        "--keep",
        type=amount,
        required=True,
        help="amount of experts to keep in each layer: a number (4) or a share (0.5 or 50%%)",
    )
    parser.add_argument(
        "--by",
        choices=["utilisation", "reversed", "random"],
        default="utilisation",
        help="experts to keep: the most used (utilisation, default), the least used (reversed) or random ones",
    )
    seed_option(parser, "--by random")
    _plain_option(parser, "even in an aggregated or upcycled run, whose compensation for copies is otherwise reduced")
    part_options(parser)
    _output_options(parser)


def _prune(given: Namespace, console: Console) -> None:
    if given.by == "random" and (given.language or given.task):
        raise UserError("--language and --task say whose utilisation counts: leave them out with --by random.")

    def pruned(run: Run) -> Result:
        layers = run.layers()
        require_separable(layers, str(run.checkpoint))
        count_kept(layers, given.keep)  # before anything is measured
        load = None if given.by == "random" else measured_load(run, language=given.language, task=given.task)
        kept = choose_experts(layers, given.keep, given.by, load=load, seed=given.seed)
        note = {name: getattr(given, name) for name in ("keep", "by", "seed", "language", "task")}
        return prune_run(run, kept, compensated=not given.plain, **note)

    _change(given, console, pruned)


PRUNE = Command(
    "Remove experts from each layer, by utilisation or at random",
    _prune_options,
    _prune,
    "  python -m moekit prune runs/tiny --keep 50% --out runs/half\n"
    "  python -m moekit prune runs/tiny --keep 2 --language avl --out runs/avl",
)


def _upcycle_options(parser: ArgumentParser) -> None:
    run_option(parser, "; dense, or sparse to add more experts")
    parser.add_argument("--experts", type=int, required=True, help="number of experts in each new sparse layer")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="noise added to the copies, in standard deviations of the weights (default: 0; 0.1 makes experts differ)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor on the output of experts of a dense run (default: 1); the number of experts roughly keeps the "
        "function with a new top-1 softmax router",
    )
    seed_option(parser, "noise and new routers")
    _plain_option(parser, "for a sparse run, where copies of an expert then share its routing weight")
    _output_options(parser)


def _upcycle(given: Namespace, console: Console) -> None:
    if given.noise < 0:
        raise UserError(f"--noise must not be negative: got {given.noise:g}.")
    options = {"noise": given.noise, "scale": given.scale, "compensated": not given.plain, "seed": given.seed}
    _change(given, console, lambda run: upcycle_run(run, given.experts, **options))


UPCYCLE = Command(
    "Turn the feed-forward layers of a dense model into experts, or copy experts of a sparse one",
    _upcycle_options,
    _upcycle,
    "  python -m moekit upcycle runs/dense --experts 8 --noise 0.1 --scale 8 --restart --out runs/sparse",
)


def _merge_options(parser: ArgumentParser) -> None:
    run_option(parser)
    parser.add_argument("--by-load", action="store_true", help="weight experts by utilisation (default: equally)")
    part_options(parser)
    _output_options(parser)


def _merge(given: Namespace, console: Console) -> None:
    if not given.by_load and (given.language or given.task):
        raise UserError("--language and --task say whose utilisation counts: give --by-load with them.")

    def merged(run: Run) -> Result:
        return merge_run(run, measured_load(run, language=given.language, task=given.task) if given.by_load else None)

    _change(given, console, merged)


MERGE = Command(
    "Average the experts of each layer into a dense model",
    _merge_options,
    _merge,
    "  python -m moekit merge runs/tiny --by-load --restart --out runs/dense",
)


def _split_options(parser: ArgumentParser) -> None:
    run_option(parser, "; the recipe must have the setting model.k")
    parser.add_argument(
        "--parts", type=int, required=True, help="parts per expert; experts per token (model.k) grow by this factor"
    )
    parser.add_argument(
        "--whole-weights",
        action="store_true",
        help="give each part the full routing weight of its expert, for routers with unnormalised sigmoid scores",
    )
    _output_options(parser)


SPLIT = Command(
    "Split each expert into several smaller ones",
    _split_options,
    lambda given, console: _change(
        given, console, lambda run: split_run(run, given.parts, divided=not given.whole_weights)
    ),
    "  python -m moekit split runs/shazeer-tiny --parts 2 --out runs/fine",
)


def _change_options(parser: ArgumentParser) -> None:
    run_option(parser)
    parser.add_argument(
        "--set",
        action="append",
        required=True,
        metavar="KEY=VALUE",
        help="setting that needs no new weights, such as model.capacity_factor=2.0 or model.k=1; may be repeated",
    )
    _output_options(parser)


def _set(given: Namespace, console: Console) -> None:
    for item in given.set:
        if "=" not in item.lstrip("="):
            raise UserError(f"--set must be KEY=VALUE: got {item!r}.")
    options = [f"--{item}" for item in given.set]
    _change(given, console, lambda run: change_run(run, reconfigured(run.recipe, run.config, options)))


CHANGE = Command(
    "Change settings that need no new weights, such as the capacity factor",
    _change_options,
    _set,
    "  python -m moekit change runs/tiny --set model.capacity_factor=2.0 --out runs/roomy",
)
