"""The command prune."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from rich.console import Console

from moekit.cli.command import Command
from moekit.cli.folders import FOLDER, of_folder, text_given, text_options, write_changed
from moekit.cli.surgery import amount, change, output_options, part_options, plain_option, run_option, seed_option

if TYPE_CHECKING:
    from moekit.runs.run import Run
    from moekit.runs.surgery.operations import Result


def _options(parser: ArgumentParser) -> None:
    run_option(parser, FOLDER)
    parser.add_argument(
        "--keep",
        type=amount,
        required=True,
        help="amount of experts to keep in each layer: a number (4) or a share (0.5 or 50%%)",
    )
    parser.add_argument(
        "--by",
        choices=["utilisation", "reversed", "random", "reap"],
        default="utilisation",
        help="experts to keep: the most used (utilisation, default), the least used (reversed), random ones, or those "
        "whose weighted output is largest where they are used (reap)",
    )
    seed_option(parser, "--by random")
    plain_option(parser, "even in an aggregated or upcycled run, whose compensation for copies is otherwise reduced")
    part_options(parser)
    output_options(parser)
    text_options(parser, "on which experts are chosen (training split)")


def _prune(given: Namespace, console: Console) -> None:
    from moekit.runs.folders.changing import prune_folder  # where it is used: a help text needs none of it
    from moekit.runs.surgery.operations import prune_run
    from moekit.runs.surgery.utilisation import measured_load, measured_saliency, require_measured
    from moekit.surgery import choose_experts, count_kept, require_separable

    if of_folder(given):
        options = {"seed": given.seed, "overwrite": given.overwrite}
        source, text = given.run, text_given(given)
        write_changed(given, console, lambda: prune_folder(source, given.out, given.keep, given.by, text, **options))
        return

    require_measured(given.by, given.language, given.task)

    def pruned(run: Run) -> Result:
        layers = run.layers()
        require_separable(layers, str(run.checkpoint))
        count_kept(layers, given.keep)  # before anything is measured
        load = None
        if given.by == "reap":
            load = measured_saliency(run, task=given.task)
        elif given.by != "random":
            load = measured_load(run, language=given.language, task=given.task)
        kept = choose_experts(layers, given.keep, given.by, load=load, seed=given.seed)
        note = {name: getattr(given, name) for name in ("keep", "by", "seed", "language", "task")}
        return prune_run(run, kept, compensated=not given.plain, **note)

    change(given, console, pruned)


COMMAND = Command(
    "Remove experts from each layer, by utilisation, by saliency or at random",
    _options,
    _prune,
    "  moekit prune runs/tiny --keep 50% --out runs/half\n"
    "  moekit prune runs/tiny --keep 2 --language avl --out runs/avl\n"
    "  moekit prune OLMoE-1B-7B --keep 50% --by reap --data.path my-text --out OLMoE-half",
)
