"""The ranges of settings that are numbers: one outside is refused by its key, before anything is read or made."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from moekit.errors import UserError

_AT_LEAST = {
    "data.max_languages": 1, "data.vocab_size": 1, "data.heating_steps": 0, "data.num_workers": 0, "data.seed": 0,
    "data.order_seed": 0,
    "train.max_steps": 0, "train.max_minutes": 0, "train.learning_rate": 0, "train.warmup_steps": 0,
    "train.weight_decay": 0, "train.clip": 0, "train.clip_update": 0, "train.accumulate": 1,
    "train.validate_every": 0, "train.checkpoint_minutes": 0, "train.checkpoint_steps": 0, "train.log_every": 1,
    "train.seed": 0, "train.devices": 1, "train.num_nodes": 1,
    "evaluate.beam_size": 1, "evaluate.max_sentences": 0, "evaluate.valid_sentences": 0,
    "evaluate.batch_tokens": 1, "evaluate.samples": 0,
}  # fmt: skip
"""The least value of a key. Where 0 means none, no limit or all, it is 0."""

_ABOVE = {"data.temperature": 0, "train.expert_lr_multiplier": 0}
"""What a key must be greater than."""

_SHARES = ("train.label_smoothing", "model.dropout")
"""Keys from 0 to, but not, 1."""


def check_ranges(config: Any) -> None:
    """Compare the numbers of a configuration with what they may be.

    Keys that it does not have, and words such as auto, are passed over.

    Raises:
        UserError: one is out of its range, or is no number; the message has the key, its range and what was given.
    """
    for key, least in (_AT_LEAST | _of_tasks(config)).items():
        value = _get(config, key)
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= least):
            raise UserError(f"{key} must be {least} or more: got {value}.")
    for key, bound in _ABOVE.items():
        value = _get(config, key)
        if isinstance(value, int | float) and not (math.isfinite(value) and value > bound):
            raise UserError(f"{key} must be greater than {bound}: got {value}.")
    for key in _SHARES:
        value = _get(config, key)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{key} must be 0 or more and less than 1: got {value}.")
    if (betas := _get(config, "train.betas")) is not None and not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"train.betas must be two numbers of 0 or more and less than 1: got {list(betas)}.")


def check_warmup(train: Any) -> None:
    """A cosine has to have steps left when the warm-up ends.

    Raises:
        UserError: the warm-up takes all steps.
    """
    if train.schedule == "cosine" and 0 < train.max_steps <= train.warmup_steps:
        raise UserError(
            f"train.warmup_steps must be less than train.max_steps: got {train.warmup_steps} of {train.max_steps}. "
            "Give a shorter warm-up or more steps."
        )


def _of_tasks(config: Any) -> dict[str, int]:
    tasks = getattr(config, "tasks", None)
    names = [] if tasks is None else [f.name for f in fields(tasks)]
    return {f"tasks.{name}.{key}": 0 for name in names for key in ("tokens", "weight")}


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name, None)
    return config
