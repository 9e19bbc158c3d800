"""Counts of rows as numbers of the host: read from a device once, however many products ask for them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_READ = WeakTensorKeyDictionary()


def on_host(counts: Tensor) -> Tensor:
    """The same counts on the CPU. Those of a device are read when they are first asked for, and remembered.

    A tensor that was given here must not be written to afterwards.
    """
    if counts.device.type in ("cpu", "meta"):
        return counts
    if torch.compiler.is_compiling():
        return counts.cpu()
    if counts not in _READ:
        _READ[counts] = counts.cpu()  # host read
    found: Tensor = _READ[counts]
    return found


def remember(counts: Tensor, numbers: Tensor) -> Tensor:
    """Say what the counts of a device are on the host, so that nobody reads them; returns `counts`."""
    if counts is not numbers and counts.device.type not in ("cpu", "meta") and not torch.compiler.is_compiling():
        _READ[counts] = numbers
    return counts


def split_counts(counts: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Parts of counts; the parts of what was read are not read again."""
    numbers = on_host(counts).split(sizes)
    return tuple(remember(part, known) for part, known in zip(counts.split(sizes), numbers, strict=True))
