"""The command import."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command, path, say
from moekit.shell import command_line


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="FOLDER", help="Hugging Face folder: config.json and safetensors")
    parser.add_argument(
        "--like",
        type=path,
        required=True,
        metavar="RUN",
        help="run of the same model, such as the one exported; it provides recipe, settings and tokenizer",
    )
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="folder of the new run")
    parser.add_argument("--dropless", action="store_true", help="drop no tokens: ignore expert capacity")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def _import(given: Namespace, console: Console) -> None:
    from moekit.runs.run import Run  # where it is used: a help text needs none of it
    from moekit.runs.surgery.exchange import import_run
    from moekit.runs.surgery.writing import require_free, write_run

    require_free(given.out, overwrite=given.overwrite)
    result = import_run(given.folder, Run.load(given.like), dropless=given.dropless)
    folder = write_run(result, given.out, restart=True, overwrite=given.overwrite)
    say(
        console,
        f"{folder.path}: a run of {result.run.recipe.name} with the weights of {given.folder}\n"
        f"test it with {command_line('test', folder.path)}",
    )


COMMAND = Command(
    "Import weights from a Hugging Face transformers folder as a run of the same model",
    _options,
    _import,
    "  moekit import for-transformers --like runs/switch-tiny --out runs/back\n"
    "Other SwitchTransformers and NllbMoe folders: moekit.huggingface.import_model, in Python.",
)
