"""Runs to folders of transformers, and such folders to runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moekit.errors import UserError
from moekit.huggingface import Architecture, describe, export_model, import_model
from moekit.runs.init_from import starting_tokenizer
from moekit.runs.run import Run
from moekit.runs.surgery.operations import Result
from moekit.surgery import require_complete

_BACKBONE = "backbone."
# Settings that act in training only: a run keeps its own.
_OF_TRAINING = (
    "jitter", "second_expert", "dropout", "attention_dropout", "hidden_dropout", "final_dropout",
)  # fmt: skip


def export_run(
    run: Run,
    out: Path,
    *,
    kind: Any = None,
    with_tokenizer: bool = True,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Architecture:
    """Write the model of a run as a folder that transformers opens, its vocabulary beside it.

    Args:
        run: whose checkpoint it is.
        out: the folder.
        kind: the family; None = the one that has the model's norms.
        with_tokenizer: whether the vocabulary is written.
        max_shard_bytes: greatest size of a file of weights.
        overwrite: replace an earlier export.

    Raises:
        UserError: see `moekit.huggingface.export_model`.
    """
    model = run.model()["backbone"]
    described = describe(model, kind)  # before the weights are read
    tokenizer = starting_tokenizer(run) if with_tokenizer else None
    weights = {
        name.removeprefix(_BACKBONE): tensor
        for name, tensor in run.loaded.weights.items()
        if name.startswith(_BACKBONE)
    }
    model.load_state_dict(weights, assign=True)
    export_model(model, out, kind=kind, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes, overwrite=overwrite)
    return described


def import_run(folder: Path, like: Run, *, dropless: bool = False) -> Result:
    """The weights of a folder in a run of the same model: one that was exported, and trained on in transformers.

    Args:
        folder: one of transformers.
        like: the run whose recipe, settings, vocabulary and heads the new one has; the optimizer starts afresh.
        dropless: leave the folder's capacity out.

    Raises:
        UserError: see `moekit.huggingface.import_model`; or the model is another than that of the run.
    """
    wanted = describe(like.model()["backbone"])
    found = import_model(folder, dropless=dropless, form=wanted)
    got = dataclasses.replace(found.architecture, **{name: getattr(wanted, name) for name in _OF_TRAINING})
    for field in dataclasses.fields(Architecture):
        here, there = getattr(wanted, field.name), getattr(got, field.name)
        if here != there:
            hint = " Import it dropless." if field.name == "limit" and here is None else ""
            raise UserError(
                f"{folder} must be of a model like that of {like.path}: its {field.name} is {there!r}, and the run's "
                f"{here!r}.{hint}"
            )
    weights = {f"{_BACKBONE}{name}": tensor for name, tensor in found.model.state_dict().items()}
    weights |= {name: t for name, t in like.loaded.weights.items() if not name.startswith(_BACKBONE)}
    require_complete(weights, like.model(), str(folder))
    record = {"operation": "import", "from": [str(folder)], "like": str(like.checkpoint)}
    return Result(like, like.config, weights, None, record)
