"""The configuration of a run: its settings as dataclasses, and as plain data in files and checkpoints."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from moekit.data.held_out import HeldOut
from moekit.data.module import MultitaskData
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.runs.settings.data import DataConfig
from moekit.runs.settings.evaluate import EvaluateConfig
from moekit.runs.settings.fields import RESUME, SURGERY, setting
from moekit.runs.settings.strategy import StrategyConfig
from moekit.runs.settings.train import TrainConfig

C = TypeVar("C")

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
        """This configuration with other settings.

        Args:
            **groups: by the name of a group, the settings that differ, or the whole group.
        """
        made = {
            name: dataclasses.replace(getattr(self, name), **given) if isinstance(given, Mapping) else given
            for name, given in groups.items()
        }
        return dataclasses.replace(self, **made)

    def batches(self, tokenizer: Tokenizer | None = None, held_out: HeldOut | None = None) -> MultitaskData:
        """The data module of the run; its one epoch is as long as the run may be, so that every stop is in its middle.

        Args:
            tokenizer: one that exists already; None = that of ``data.tokenizer``, or trained on the text.
            held_out: what the run kept for evaluation, which is then all there is; None = the corpus of the settings.
        """
        train = self.train
        # Tensor-parallel partners read the same batch.
        readers = max(1, train.devices * train.num_nodes // (self.strategy.tensor_parallel_size or 1))
        return self.data.batches(
            self.tasks,
            self.evaluate,
            devices=readers,
            steps=train.max_steps * train.accumulate or _ENDLESS,
            workers=self.data.workers(train),
            source=held_out,
            tokenizer=tokenizer,
        )

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


def with_setting(config: C, key: str, value: Any) -> C:
    """The configuration with the value at a dotted key replaced."""
    name, _, rest = key.partition(".")
    inner = with_setting(getattr(config, name), rest, value) if rest else value
    some: Any = config
    return dataclasses.replace(some, **{name: inner})


def as_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested plain data, as YAML and checkpoints hold it."""
    values: dict[str, Any] = plain(dataclasses.asdict(config))
    return values


def build(cls: type[C], values: Any) -> C:
    """The dataclass `cls` from parsed values or plain data, nested dataclasses and mappings of them included.

    Raises:
        KeyError: a setting without a default is missing.
    """
    hints = typing.get_type_hints(cls)
    known = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if f.name in values or not has_default:  # a run of an older version lacks the settings that came later
            known[f.name] = _coerce(hints[f.name], values[f.name])
    return cls(**known)


def _coerce(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(value)
    return value


def plain(data: Any) -> Any:
    """Mappings, sequences and paths as dictionaries, lists and strings; numbers and strings as they are.

    Raises:
        TypeError: anything else.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    raise TypeError(f"A configuration must be plain data: got {type(data).__name__} ({data!r}).")


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; a missing one is None."""
    flat_saved, flat_current = _flatten(plain(saved)), _flatten(plain(current))
    keys = [*flat_saved, *(key for key in flat_current if key not in flat_saved)]
    pairs = {key: (flat_saved.get(key), flat_current.get(key)) for key in keys}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], free: Collection[str], what: str) -> None:
    """Make sure that a run goes on with the configuration that it had.

    Args:
        saved: the configuration that it had.
        current: the one that it has now.
        free: dotted keys, of settings and of groups of settings, that may differ.
        what: names the run or the checkpoint in the message.

    Raises:
        UserError: they differ elsewhere; every differing key is listed.
    """
    different = {
        key: values
        for key, values in differences(saved, current).items()
        if not any(key == name or key.startswith(f"{name}.") for name in free)
    }
    if different:
        lines = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, (old, new) in different.items())
        raise UserError(
            f"the configuration must be that of {what} to resume it. These keys differ:{lines}\n"
            "Give the same values, or start a new run in another folder."
        )


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
