"""The command export."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command, number, path, say
from moekit.cli.surgery import config_option, run_option


def _options(parser: ArgumentParser) -> None:
    from moekit.huggingface.architecture import NAMES  # a list of commands needs none of it

    run_option(parser)
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--as",
        dest="kind",
        choices=list(NAMES),
        help="model class in transformers (default: switch_transformers for RMSNorm, nllb-moe for LayerNorm)",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="do not write the tokenizer")
    parser.add_argument(
        "--max-shard-gb",
        type=number(float, above=0),
        default=5.0,
        help="maximum size of a weights file, in gigabytes (default: 5)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    config_option(parser)


def _export(given: Namespace, console: Console) -> None:
    from moekit.huggingface.architecture import NAMES
    from moekit.runs.run import Run
    from moekit.runs.surgery.exchange import export_run

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


COMMAND = Command(
    "Export a run's model to a folder that Hugging Face transformers can load",
    _options,
    _export,
    "  moekit export runs/switch-tiny --out for-transformers",
)
