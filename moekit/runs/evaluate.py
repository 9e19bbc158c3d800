"""Testing a trained run: scores, routing and samples, written as records into its folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moekit.atomic import write_json
from moekit.data.held_out import remarks
from moekit.data.module import MultitaskData
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.inference.completer import Completer
from moekit.inference.translator import Translator, search_for
from moekit.planner.census import parameters
from moekit.runs.config import RunConfig
from moekit.runs.domains import measure_domains
from moekit.runs.ending import ending_of
from moekit.runs.facts import ask, floors
from moekit.runs.module import make_module
from moekit.runs.record import (
    TRANSLATIONS,
    DataRecord,
    DomainRecord,
    ExpertRecord,
    FloorRecord,
    HeldOutRecord,
    RoutingRecord,
    Sample,
    Summary,
    TypicalPiece,
    write_written,
)
from moekit.runs.routing import recorded, write_mechanisms
from moekit.runs.run import ROUTING, SAMPLES, SUMMARY, Run
from moekit.runs.speed import speed_of
from moekit.runs.text import evaluation_data, require_same_text
from moekit.terminal import Terminal, visible
from moekit.training.callbacks.progress import TrainingProgress
from moekit.training.checkpoint_state import load_rest
from moekit.training.metrics import PieceCounts
from moekit.training.metrics.pieces import typical_pieces
from moekit.training.multitask import MultitaskModule
from moekit.training.quiet import quiet

_LONGEST_SAMPLE = 64
"""Tokens of a continuation that is shown."""


def trained_module(
    run: Run, data: MultitaskData, config: RunConfig | None = None, weights: Mapping[str, Any] | None = None
) -> MultitaskModule:
    """The module of a trained run, ready to validate on `data`; settings and weights are the run's if not given."""
    module, _ = make_module(run.recipe, config or run.config, data, loaded=True)
    module.load_state_dict(dict(run.loaded.weights if weights is None else weights))
    return module.eval()


def evaluate(run: Run, config: RunConfig | None = None) -> bool:
    """Validate, test, and write the records of the run: summary, routing and samples.

    Args:
        run: where the checkpoint is, and where the records go.
        config: settings that are not the run's: other devices, for example.

    Returns:
        Whether this process wrote them: of several, the first does.

    Raises:
        UserError: nothing was trained there; or the folder keeps no text, and the corpus is not what it was: the record
            would be of other data.
    """
    started = time.monotonic()
    config = config or run.config
    config.evaluate.check()
    data = evaluation_data(run, config)
    if run.held_out is None:
        require_same_text(run, data, config)
    module = trained_module(run, data, config)
    search = search_for(config.evaluate.beam_size, config.evaluate.length_penalty)
    if data.directions:
        module.answers.translate = Translator(
            module.backbone, data.tokenizer, search=search, sentinel=config.data.sentinel
        )
    else:
        longest = min(_LONGEST_SAMPLE, config.data.max_length)  # no longer than what it was trained on
        module.answers.write = Completer(module.backbone, data.tokenizer, search=search, max_new_tokens=longest)
    module.answers.originals = data.originals("test")
    facts = config.data.knowledge()
    ask(module, config, data, facts)
    if module.valid_routing is not None:
        module.pieces = PieceCounts(module.valid_routing.layers, data.tokenizer.vocab_size)
    trainer = config.train.trainer(logger=False, enable_checkpointing=False, callbacks=[TrainingProgress()])
    with quiet():
        valid = next(iter(trainer.validate(module, datamodule=data, verbose=False)), {})  # none where no text is
        trainer.test(module, datamodule=data, verbose=False)
    elsewhere = measure_domains(run, config, data.tokenizer, module.tested)
    if not trainer.is_global_zero:
        return False
    known = None if facts is None else floors(data, facts)
    _write(run, config, module, data, valid, known, elsewhere, time.monotonic() - started)
    return True


def _write(
    run: Run,
    config: RunConfig,
    module: MultitaskModule,
    data: MultitaskData,
    valid: Mapping[str, float],
    known: Sequence[FloorRecord] | None,
    elsewhere: Sequence[DomainRecord],
    seconds: float,
) -> None:
    checkpoint = run.loaded.rest
    last = load_rest(run.last_checkpoint) if run.last_checkpoint else checkpoint
    used = last.get("callbacks", {})
    trained = used.get("Throughput", {})
    scores = module.answers.scores or {}
    corpus = None if run.held_out is None else run.held_out.corpus
    summary = Summary(
        recipe=run.recipe.name,
        variant=run.variant,
        smoke=run.settings.get("smoke") or None,
        data=DataRecord(
            source=",".join(config.data.sources),
            languages=data.languages,
            directions=[str(direction) for direction in data.directions],
            sentences={name: row["sentences"] for name, row in data.summary().items()},
            vocab_size=data.tokenizer.vocab_size,
        ),
        steps=int(last["global_step"]),
        evaluated_step=int(checkpoint["global_step"]),
        tokens=int(trained.get("tokens", 0)),
        wall_seconds=used.get("MaxMinutes", {}).get("seconds", 0.0),
        evaluation_seconds=seconds,
        tokens_per_second=trained.get("tokens", 0) / max(trained.get("seconds", 0.0), 1e-9),
        peak_memory=used.get("PeakMemory"),
        speed=speed_of(run.recipe, run.config, run.path, trained, int(last["global_step"])),
        parameters=parameters(module.backbone),
        bleu=scores.get("bleu"),
        chrf=scores.get("chrf"),
        scores={name: found for name, found in scores.items() if name not in ("bleu", "chrf")},
        perplexity={t: x for t, x in _by_task(valid, "perplexity").items() if data.task(t).perplexity},
        loss=_by_task(valid, "loss"),
        accuracy=_by_task(valid, "accuracy"),
        majority=module.majority,
        chance={task: module.chance[task] for task in module.majority},
        copied=module.answers.copied,
        test=module.tested,
        routing=module.routing_summary,
        ending=ending_of(config.train, last),
        tasks={name: data.task(name).record() for name in data.tasks},
        held_out=HeldOutRecord(
            valid=data.evaluated("valid"),
            test=data.evaluated("test"),
            repeated=None if corpus is None else corpus.repeated,
            remarks=remarks(data, corpus),
        ),
        floors=known or None,
        recall=module.recalled or None,
        domains=elsewhere or None,
    )
    routing = None if module.routing is None else _routing(module.routing, module.piece_counts, data)
    samples = _glossed([Sample.from_json(sample) for sample in module.answers.samples], config)
    write_json(run.path / SAMPLES, [sample.to_json() for sample in samples])
    if routing is not None:
        write_json(run.path / ROUTING, routing.to_json())
    if module.answers.written:
        write_written(run.path / TRANSLATIONS, module.answers.written)
    write_json(run.path / SUMMARY, summary.to_json())
    _measure_routing(run)


def _measure_routing(run: Run) -> None:
    """Write the mechanisms of what was recorded in training; a file of it that is gone spoils no test."""
    try:
        if found := recorded(run):
            write_mechanisms(run, found)
    except UserError as error:
        Terminal(stderr=True, soft_wrap=True).print(visible(f"mechanisms of routing are not measured: {error}"))


def _routing(found: Mapping[str, Any], counts: Mapping[str, Tensor], data: MultitaskData) -> RoutingRecord:
    """The record, with the typical pieces of experts where they were counted."""
    record, tokenizer = RoutingRecord.from_json(found), data.tokenizer
    layers = [
        dataclasses.replace(layer, typical=_typical(counts[layer.name], tokenizer)) if layer.name in counts else layer
        for layer in record.layers
    ]
    return dataclasses.replace(record, layers=layers)


def _typical(counts: Tensor, tokenizer: Tokenizer) -> list[ExpertRecord]:
    """Of a layer with counts Int64[V, E]."""
    found = typical_pieces(counts, first=tokenizer.first_text_id)
    return [
        ExpertRecord(
            expert=expert,
            pieces=[TypicalPiece(piece=tokenizer.piece(p), count=n, lift=round(lift, 4)) for p, n, lift in pieces],
        )
        for expert, pieces in enumerate(found)
        if pieces
    ]


def _glossed(samples: list[Sample], config: RunConfig) -> list[Sample]:
    """Samples with English, word by word, where a source knows their languages."""
    known = config.data.glossary() if samples else None
    if known is None:
        return samples
    found = []
    for sample in samples:
        source, hyphen, target = sample.direction.partition("-")
        places = {"source": source, "reference": target, "hypothesis": target} if hyphen else {}
        places = places or dict.fromkeys(("source", "reference", "hypothesis"), source)
        glosses: dict[str, Any] = {
            f"{name}_gloss": known.word_by_word(code, getattr(sample, name)) for name, code in places.items()
        }
        found.append(dataclasses.replace(sample, **glosses))
    return found


def _by_task(values: Mapping[str, float], what: str) -> dict[str, float]:
    return {name.split("/")[1]: v for name, v in values.items() if name.startswith("valid/") and name.endswith(what)}
