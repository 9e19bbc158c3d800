"""A smoke test: every stage of a run in seconds, to see that all of it works here. Its numbers mean nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekit.runs.config import RunConfig

WARNING = "smoke test: tiny and short; its numbers are no results"
"""What is said wherever such a run is shown."""

_AT_MOST: Mapping[str, Mapping[str, Any]] = {
    "model": {
        "dim": 32, "hidden_dim": 64, "heads": 2, "head_dim": 16, "units": 32, "expert_hidden_dim": 64, "layers": 4,
        "encoder_layers": 2, "decoder_layers": 2, "every": 2, "layer": 2, "num_experts": 8, "groups": 2, "sublayers": 2,
        "generator_dim": 16, "generator_layers": 1, "dense_steps": 2,
    },
    "data": {"vocab_size": 1000, "max_length": 32, "heating_steps": 4},
    "train": {"warmup_steps": 2, "accumulate": 2},
    "evaluate": {
        "max_sentences": 2, "valid_sentences": 2, "batch_tokens": 512, "samples": 1, "beam_size": 2, "words": 1,
    },
}  # fmt: skip
"""Sizes that a smoke test lowers, by group and setting, where a recipe has them."""
_ZERO_IS_ALL = ("max_sentences", "valid_sentences")
_SENTENCES, _LANGUAGES = 200, 4
"""Generated sentences of each of so many languages, of which a vocabulary of that size can be made."""
_STEPS = 6
_TOKENS = 128


def smoke(config: RunConfig) -> RunConfig:
    """The settings of a smoke test of this configuration: its kind of everything, small and short.

    Every stage takes place twice where it can: steps, rows of metrics, validations and checkpoints.
    """
    groups: dict[str, dict[str, Any]] = {}
    for group, bounds in _AT_MOST.items():
        given = getattr(config, group)
        known = {f.name: getattr(given, f.name) for f in dataclasses.fields(given) if f.name in bounds}
        groups[group] = {
            name: bounds[name] if name in _ZERO_IS_ALL and not value else min(value, bounds[name])
            for name, value in known.items()
        }
    groups["train"] |= {
        "max_steps": _STEPS, "validate_every": _STEPS // 2, "checkpoint_steps": _STEPS // 2, "log_every": 2,
        "precision": "auto",
    }  # fmt: skip
    # Fewer languages must have more words each for the same vocabulary, and words grow as about the root of the text.
    scarce = max(1, _LANGUAGES / config.data.babel_languages) ** 2
    groups["data"]["babel_sentences"] = min(config.data.babel_sentences, round(_SENTENCES * scarce))
    if isinstance(sizes := config.data.babel_sizes, dict):
        groups["data"]["babel_sizes"] = {code: min(size, 100) for code, size in sizes.items()}
    tasks = {
        f.name: dataclasses.replace(task, tokens=min(task.tokens, _TOKENS))
        for f in dataclasses.fields(config.tasks)
        for task in [getattr(config.tasks, f.name)]
    }
    return config.changed(**groups, tasks=tasks)
