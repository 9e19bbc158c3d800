"""The configuration of a run: its settings as dataclasses, and as plain data in files and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from moekit.data.held_out import HeldOut, HeldOutData
from moekit.data.module import MultitaskData
from moekit.data.tokenizer import Tokenizer, TokenizerOptions
from moekit.errors import UserError
from moekit.runs.settings.data import DataConfig
from moekit.runs.settings.fields import RESUME, SURGERY, setting
from moekit.runs.settings.tasks import EvaluateConfig, active_tasks
from moekit.runs.settings.train import StrategyConfig, TrainConfig
from moekit.tasks import task_data

_ENDLESS = 100_000_000
"""Batches of a run that only minutes limit."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is made of.

    Attributes:
        data: where text comes from.
        train: how training goes.
        evaluate: how the result is evaluated.
        strategy: how the model is spread over processes.
        model: the network, of the recipe's own type.
        tasks: the tasks and their tokens per step, of the recipe's own type.
    """

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = setting(default_factory=TrainConfig, free=SURGERY)
    evaluate: EvaluateConfig = setting(default_factory=EvaluateConfig, free=SURGERY)
    strategy: StrategyConfig = setting(default_factory=StrategyConfig, free=RESUME + SURGERY)
    model: Any = None
    tasks: Any = setting(None, free=SURGERY)

    def changed(self, **groups: Any) -> RunConfig:
        """This configuration with other settings: by the names of groups, and of groups in them, those that differ."""
        return cast(RunConfig, _changed(self, groups))

    def batches(
        self,
        tokenizer: Tokenizer | None = None,
        held_out: HeldOut | None = None,
        make: type[MultitaskData] = MultitaskData,
    ) -> MultitaskData:
        """The data module of the run; its one epoch is as long as the run may be, so that every stop is in its middle.

        Args:
            tokenizer: one that exists already; None = that of ``data.tokenizer``, or trained on the text.
            held_out: what the run kept for evaluation, which is then all there is; None = the corpus of the settings.
            make: what is made of the corpus.

        Raises:
            UserError: no task takes part, or something is wrong with the data.
        """
        data, train, evaluate = self.data, self.train, self.evaluate
        active = active_tasks(self.tasks)
        if not active:
            raise UserError("tasks must give at least one task its tokens: all have 0. Set tasks.translation.tokens.")
        tasks = task_data(active, data, kept=held_out is not None)
        if tokenizer is None and data.tokenizer is not None:
            tokenizer = Tokenizer.load(data.tokenizer)
        # Tensor-parallel partners read the same batch.
        readers = max(1, train.devices * train.num_nodes // (self.strategy.tensor_parallel_size or 1))
        options: dict[str, Any] = {
            "tasks": tasks,
            "tokenizer": tokenizer,
            "cache": data.cache,
            "vocab_size": data.vocab_size,
            "tokenizer_options": TokenizerOptions(
                byte_fallback=data.byte_fallback,
                character_coverage=data.character_coverage,
                normalization=data.normalization_rule_name,
            ),
            "tokens_per_step": readers * sum(task.tokens for task in active.values()),
            "evaluation_tokens": readers * evaluate.batch_tokens,
            "temperature": data.temperature_schedule(train.accumulate),
            "max_length": data.max_length,
            "too_long": data.too_long,
            "steps_per_epoch": train.max_steps * train.accumulate or _ENDLESS,
            "valid_sentences": evaluate.valid_sentences or None,
            "test_sentences": evaluate.max_sentences or None,
            "seed": data.seed,
            "order_seed": data.order_seed,
            "num_workers": data.workers(train),
        }
        return make(data.open(), **options) if held_out is None else HeldOutData(held_out, **options)

    def settled(self, kept: Mapping[str, Any] | None = None) -> RunConfig:
        """The configuration with what "auto" is on this machine, or was when the run began.

        Args:
            kept: the configuration in the folder of a run that goes on: its precision stays, wherever it goes on.
        """
        train = self.train
        if train.precision == "auto":
            train = dataclasses.replace(train, precision=(kept or {}).get("train", {}).get("precision", "auto"))
            if train.on_gpu and train.usable_precision == "32-true":
                torch.set_float32_matmul_precision("high")
        train = dataclasses.replace(train, precision=train.usable_precision)
        return self.changed(train=train, data={"num_workers": self.data.workers(train)})


def _changed(group: Any, given: Mapping[str, Any]) -> Any:
    """A dataclass with other fields; a mapping is what differs in the dataclass that the field holds."""
    made = {}
    for name, value in given.items():
        held = getattr(group, name, None)
        made[name] = _changed(held, value) if isinstance(value, Mapping) and dataclasses.is_dataclass(held) else value
    return dataclasses.replace(group, **made)
