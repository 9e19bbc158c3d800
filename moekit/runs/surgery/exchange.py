"""Runs to folders of transformers, and such folders to runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moekit.data.sources import KINDS
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
    export_model(
        model,
        out,
        kind=kind,
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        card=run_card(run),
    )
    return described


def run_card(run: Run) -> dict[str, Any]:
    """What a run's records say of it, as `moekit.huggingface.write_card` takes it.

    Raises:
        UserError: a record cannot be read.
    """
    recipe = run.settings.get("recipe"), run.settings.get("variant")
    card: dict[str, Any] = {"summary": f"Trained with moekit: recipe {recipe[0]}, variant {recipe[1]}."}
    found = run.summary
    if found is None:
        return card
    if found.smoke:
        card["summary"] += " A smoke test: its numbers are no results."
    text = found.data
    kinds = [kind for kind in text.source.split(",") if kind]
    generated = any("path" not in KINDS[kind].parameters() for kind in kinds if kind in KINDS)
    data = [f"Kinds of text: {text.source}; languages: {', '.join(text.languages)}."] if kinds else []
    data += [f"{task}: {number:,.0f} sentences of training." for task, number in text.sentences.items()]
    if text.directions:
        data.append(f"Directions: {', '.join(text.directions)}.")
    metrics: dict[str, float] = {}
    for name, score in {"BLEU": found.bleu, "chrF": found.chrf, **found.scores}.items():
        if score and isinstance(score.get("average"), int | float):
            metrics[f"test {name}, average"] = score["average"]
    metrics |= {f"validation perplexity, {task}": value for task, value in found.perplexity.items()}
    metrics |= {f"validation accuracy, {task}": value for task, value in found.accuracy.items()}
    steps = {"steps": found.steps, "step of these weights": found.evaluated_step, "training tokens": found.tokens}
    settings = {name: f"{value:,}" for name, value in steps.items() if value is not None}
    # Codes of generated languages are nobody's.
    return {
        **card,
        "data": data,
        "metrics": metrics,
        "settings": settings,
        "language": [] if generated else text.languages,
    }


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
