"""What settings that say "auto" are on this machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch

from moekit.errors import UserError
from moekit.recipes._config import TrainConfig

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
WORKERS = 4  # beside each GPU, at most


def usable_accelerator(wanted: str) -> str:
    """What the Trainer is told for ``train.accelerator``: "auto" is a GPU of CUDA or ROCm where there is one, else the
    CPU.

    Left to Lightning, "auto" and "gpu" would be Apple's MPS on a Mac, which has no float64: statistics over a run could
    not be kept there.

    Raises:
        UserError: if a GPU is asked for and there is none.
    """
    if torch.cuda.is_available():
        return wanted
    if wanted == "gpu":
        has = "Apple's MPS, which has no float64, is not supported" if torch.backends.mps.is_available() else "got none"
        raise UserError(
            f"train.accelerator gpu needs a GPU that torch sees through torch.cuda (CUDA or ROCm): {has}. Say cpu."
        )
    return "cpu"


def on_gpu(train: TrainConfig) -> bool:
    """Whether a run with these settings computes on a GPU here."""
    return usable_accelerator(train.accelerator) != "cpu"


def usable_precision(train: TrainConfig) -> Precision:
    """What "auto" is here: bf16-mixed on a GPU that computes in bf16 by itself, else 32-true."""
    if train.precision != "auto":
        return train.precision
    bf16 = on_gpu(train) and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if bf16 else "32-true"


def usable_workers(workers: int | str, train: TrainConfig) -> int:
    """How many processes prepare batches for each that trains."""
    if isinstance(workers, int):
        return workers
    if not on_gpu(train):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(WORKERS, cores // max(train.devices, 1) - 1))


def settled(config: Any, kept: Mapping[str, Any] | None = None) -> Any:
    """The configuration with what "auto" is on this machine, or was when the run began.

    Args:
        config: of a run.
        kept: the configuration in the folder of a run that goes on: its precision stays, wherever it goes on.
    """
    train: TrainConfig = config.train
    if train.precision == "auto":
        was = (kept or {}).get("train", {}).get("precision", "auto")
        train = dataclasses.replace(train, precision=was)
        if on_gpu(train) and usable_precision(train) == "32-true":
            torch.set_float32_matmul_precision("high")
    train = dataclasses.replace(train, precision=usable_precision(train))
    data = dataclasses.replace(config.data, num_workers=usable_workers(config.data.num_workers, train))
    return dataclasses.replace(config, train=train, data=data)
