"""The commands export and import of ``python -m moekit.surgery``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from moekit.cli.surgery_command import SurgeryCommand
from moekit.errors import UserError
from moekit.huggingface.architecture import NAMES
from moekit.runs.run import Run
from moekit.runs.surgery.exchange import export_run, import_run
from moekit.runs.surgery.writing import require_free, write_run


def _export_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for transformers")
    parser.add_argument(
        "--as",
        dest="kind",
        choices=list(NAMES),
        default=None,
        help="the family (default: switch_transformers for RMS norms, nllb-moe for layer norms)",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="do not write the vocabulary")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="split weights into files of so many gigabytes")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="config.yaml, for bare checkpoints")


def _export(given: Namespace, console: Console) -> None:
    if not given.max_shard_gb > 0:
        raise UserError(f"--max-shard-gb must be positive: got {given.max_shard_gb:g}.")
    run = Run.load(given.run, given.config)
    written = export_run(
        run,
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
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _import_options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of transformers: config.json, safetensors")
    parser.add_argument(
        "--like",
        type=Path,
        required=True,
        metavar="RUN",
        help="run with such a model, such as the one that was exported; its recipe, settings and vocabulary are taken",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the new run")
    parser.add_argument("--dropless", action="store_true", help="leave the capacity of the folder's model out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def _import(given: Namespace, console: Console) -> None:
    require_free(given.out, overwrite=given.overwrite)
    result = import_run(given.folder, Run.load(given.like), dropless=given.dropless)
    folder = write_run(result, given.out, restart=True, overwrite=given.overwrite)
    recipe = f"python -m moekit.recipes.{result.run.recipe.name}"
    console.print(
        f"{folder.path}: a run of {result.run.recipe.name} with the weights of {given.folder}\n"
        f"test it with {recipe} test --out {folder.path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


COMMANDS: Mapping[str, SurgeryCommand] = {
    "export": SurgeryCommand(
        "write a run's model as a folder that Hugging Face transformers opens",
        _export_options,
        _export,
        "  python -m moekit.surgery export runs/switch-tiny --out for-transformers",
    ),
    "import": SurgeryCommand(
        "take the weights of a folder of Hugging Face transformers into a run of the same model",
        _import_options,
        _import,
        "  python -m moekit.surgery import for-transformers --like runs/switch-tiny --out runs/back\n"
        "Other SwitchTransformers and NllbMoe folders: moekit.huggingface.import_model, in Python.",
    ),
}
