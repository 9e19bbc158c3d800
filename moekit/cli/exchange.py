"""The commands export and import: folders of Hugging Face transformers from runs, and runs from such folders."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from moekit.cli.command import Command, say
from moekit.cli.surgery import config_option, run_option
from moekit.errors import UserError
from moekit.huggingface.architecture import NAMES
from moekit.runs.run import Run
from moekit.runs.surgery.exchange import export_run, import_run
from moekit.runs.surgery.writing import require_free, write_run


def _export_options(parser: ArgumentParser) -> None:
    run_option(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--as",
        dest="kind",
        choices=list(NAMES),
        help="model class in transformers (default: switch_transformers for RMSNorm, nllb-moe for LayerNorm)",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="do not write the tokenizer")
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="maximum size of a weights file, in gigabytes (default: 5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    config_option(parser)


def _export(given: Namespace, console: Console) -> None:
    if not given.max_shard_gb > 0:
        raise UserError(f"--max-shard-gb must be positive: got {given.max_shard_gb:g}.")
    written = export_run(
        Run.load(given.run, given.config),
        given.out,
        kind=given.kind,
        with_tokenizer=not given.no_tokenizer,
        max_shard_bytes=int(given.max_shard_gb * 1e9),
        overwrite=given.overwrite,
    )
    lines = [
        f"{given.out}: {NAMES[written.kind]}",
        f"open it with AutoModelForSeq2SeqLM.from_pretrained('{given.out}')",
    ]
    if written.kind == "nllb-moe" and (written.encoder_sparse or written.decoder_sparse):
        lines.append(
            "note: the sparse layer of NllbMoe in transformers 5 runs experts 0 and 1 whichever its router chose; "
            "until that is mended its answers differ from this model's"
        )
    say(console, "\n".join(lines))


EXPORT = Command(
    "Export a run's model to a folder that Hugging Face transformers can load",
    _export_options,
    _export,
    "  python -m moekit export runs/switch-tiny --out for-transformers",
)


def _import_options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Hugging Face folder: config.json and safetensors")
    parser.add_argument(
        "--like",
        type=Path,
        required=True,
        metavar="RUN",
        help="run of the same model, such as the one exported; it provides recipe, settings and tokenizer",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the new run")
    parser.add_argument("--dropless", action="store_true", help="drop no tokens: ignore expert capacity")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def _import(given: Namespace, console: Console) -> None:
    require_free(given.out, overwrite=given.overwrite)
    result = import_run(given.folder, Run.load(given.like), dropless=given.dropless)
    folder = write_run(result, given.out, restart=True, overwrite=given.overwrite)
    recipe = f"python -m moekit.recipes.{result.run.recipe.name}"
    say(
        console,
        f"{folder.path}: a run of {result.run.recipe.name} with the weights of {given.folder}\n"
        f"test it with {recipe} test --out {folder.path}",
    )


IMPORT = Command(
    "Import weights from a Hugging Face transformers folder as a run of the same model",
    _import_options,
    _import,
    "  python -m moekit import for-transformers --like runs/switch-tiny --out runs/back\n"
    "Other SwitchTransformers and NllbMoe folders: moekit.huggingface.import_model, in Python.",
)
