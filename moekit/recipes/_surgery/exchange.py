"""The commands export and import: runs of recipes to folders of transformers, and such folders to runs."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from moekit.errors import UserError
from moekit.huggingface import Architecture, describe, export_model, import_model
from moekit.huggingface.architecture import NAMES
from moekit.recipes._start import tokenizer_of
from moekit.recipes._surgery.operations import Result
from moekit.recipes._surgery.subject import Subject, open_subject
from moekit.recipes._surgery.writing import require_free, write_run
from moekit.surgery import require_complete
from moekit.surgery.command import Command

_BACKBONE = "backbone."
# Settings that act in training only: a run keeps its own.
_OF_TRAINING = (
    "jitter", "second_expert", "dropout", "attention_dropout", "hidden_dropout", "final_dropout",
)  # fmt: skip


def export_run(
    subject: Subject,
    out: Path,
    *,
    kind: Any = None,
    with_tokenizer: bool = True,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Architecture:
    """Write the model of a run as a folder that transformers opens, its vocabulary beside it.

    Args:
        subject: the run.
        out: the folder.
        kind: the family; None = the one that has the model's norms.
        with_tokenizer: whether the vocabulary is written.
        max_shard_bytes: of a file of weights.
        overwrite: replace an earlier export.

    Returns:
        What was written.

    Raises:
        UserError: see `moekit.huggingface.export_model`.
    """
    model = _backbone(subject)
    described = describe(model, kind)  # before the weights are read
    tokenizer = tokenizer_of(subject) if with_tokenizer else None
    weights = {
        name.removeprefix(_BACKBONE): tensor
        for name, tensor in subject.loaded.weights.items()
        if name.startswith(_BACKBONE)
    }
    model.load_state_dict(weights, assign=True)
    export_model(model, out, kind=kind, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes, overwrite=overwrite)
    return described


def import_run(folder: Path, like: Subject, *, dropless: bool = False) -> Result:
    """The weights of a folder in a run of the same model: one that was exported, and trained on in transformers.

    Args:
        folder: of transformers.
        like: the run whose recipe, settings, vocabulary and heads the new one has; the optimizer starts afresh.
        dropless: leave the folder's capacity out.

    Raises:
        UserError: see `moekit.huggingface.import_model`; or the model is another than that of the run.
    """
    wanted = describe(_backbone(like))
    found = import_model(folder, dropless=dropless, form=wanted)
    own = {name: getattr(wanted, name) for name in _OF_TRAINING}
    got = dataclasses.replace(found.architecture, **own)
    for field in dataclasses.fields(Architecture):
        here, there = getattr(wanted, field.name), getattr(got, field.name)
        if here != there:
            hint = " Import it dropless." if field.name == "limit" and here is None else ""
            raise UserError(
                f"{folder} must be of a model like that of {like.path}: its {field.name} is {there!r}, and the run's "
                f"{here!r}.{hint}"
            )
    weights = {f"{_BACKBONE}{name}": tensor for name, tensor in found.model.state_dict().items()}
    heads = {name: t for name, t in like.loaded.weights.items() if not name.startswith(_BACKBONE)}
    weights |= heads
    require_complete(weights, like.model(), str(folder))
    record = {"operation": "import", "from": [str(folder)], "like": str(like.path)}
    return Result(like, like.config, weights, None, record)


def _backbone(subject: Subject) -> nn.Module:
    """The network of a run, without memory."""
    model = subject.model()
    assert isinstance(model, nn.ModuleDict)
    return model["backbone"]


# -- commands ------------------------------------------------------------------------------------------------------


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
    subject = open_subject(given.run, given.config)
    written = export_run(
        subject,
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
    result = import_run(given.folder, open_subject(given.like), dropless=given.dropless)
    folder = write_run(result, given.out, restart=True, overwrite=given.overwrite)
    recipe = f"python -m moekit.recipes.{result.subject.recipe.name}"
    console.print(
        f"{folder.path}: a run of {result.subject.recipe.name} with the weights of {given.folder}\n"
        f"test it with {recipe} test --out {folder.path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


COMMANDS: Mapping[str, Command] = {
    "export": Command(
        "write a run's model as a folder that Hugging Face transformers opens",
        _export_options,
        _export,
        "  python -m moekit.surgery export runs/switch-tiny --out for-transformers",
    ),
    "import": Command(
        "take the weights of a folder of Hugging Face transformers into a run of the same model",
        _import_options,
        _import,
        "  python -m moekit.surgery import for-transformers --like runs/switch-tiny --out runs/back\n"
        "Other SwitchTransformers and NllbMoe folders: moekit.huggingface.import_model, in Python.",
    ),
}
