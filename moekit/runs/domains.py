"""The loss of a run on text of other domains than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.data.held_out import TestTextData
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError, nearest
from moekit.runs.config import RunConfig
from moekit.runs.facts import floor
from moekit.runs.module import make_module
from moekit.runs.record import DomainRecord
from moekit.runs.run import Run
from moekit.tasks import TASKS
from moekit.training.callbacks.progress import TrainingProgress
from moekit.training.quiet import quiet


def domain_data(config: RunConfig, tokenizer: Tokenizer) -> dict[str, TestTextData]:
    """The test text of the domains that `config` names, in the pieces of a tokenizer.

    Raises:
        UserError: text is not there, or of languages that the tokenizer has not.
    """
    found = {}
    for name, given in (config.evaluate.domains or {}).items():
        where = f"evaluate.domains.{name}"
        try:
            data = config.changed(data=config.data.of_domain(given)).batches(tokenizer, make=TestTextData)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        assert isinstance(data, TestTextData)
        for language in data.languages:
            if language not in tokenizer.languages:
                raise UserError(
                    f"{where} must be in languages of the run: got {language}. {nearest(language, tokenizer.languages)}"
                )
        if not any(data.evaluated("test").values()):
            raise UserError(f"{where} must have test text for {', '.join(data.tasks)}: it has none.")
        found[name] = data
    return found


def measure_domains(
    run: Run, config: RunConfig, tokenizer: Tokenizer, own: Mapping[str, Mapping[str, Any]]
) -> list[DomainRecord]:
    """The loss of every task on every domain; all processes call it.

    Args:
        run: whose weights are measured.
        config: its settings, with `evaluate.domains`.
        tokenizer: that of the run.
        own: what the test came to by task, with ``loss``; of a task whose answers are scored, nothing.

    Raises:
        UserError: as `domain_data`.
    """
    found = []
    for name, data in domain_data(config, tokenizer).items():
        module, _ = make_module(run.recipe, config, data, loaded=True)
        module.load_state_dict(dict(run.loaded.weights))
        trainer = config.train.trainer(logger=False, enable_checkpointing=False, callbacks=[TrainingProgress()])
        with quiet():
            values = trainer.validate(module.eval(), datamodule=data, verbose=False)[0]
        for task, sentences in data.evaluated("test").items():
            loss = values.get(f"valid/{task}/loss")
            if loss is None:
                continue
            known = _floor(config, name, data) if TASKS[task].recalls == "sentence" else None
            found.append(
                DomainRecord(
                    name=name, task=task, sentences=sentences, loss=loss,
                    above_test=loss - own[task]["loss"] if task in own else None,
                    knowing=known and known[0], guessing=known and known[1],
                )
            )  # fmt: skip
    return found


def _floor(config: RunConfig, name: str, data: TestTextData) -> tuple[float, float] | None:
    """What the best of models would lose there, where that is known."""
    domains = config.evaluate.domains
    assert domains is not None, "there is one"
    source = config.data.of_domain(domains[name]).knowledge()
    return None if source is None else floor(data, source, "test")
