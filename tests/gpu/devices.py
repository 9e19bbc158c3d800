"""The devices that tests of this folder run on: the pretended GPU everywhere, and a real one where there is one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from script_module import module_of
from torch import Tensor

from moekit.testing.pretended_gpu import Wait, pretended_gpu

TESTS = Path(__file__).resolve().parents[1]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees through torch.cuda")
EVERY = pytest.mark.parametrize("device", ["pretended", pytest.param("real", marks=[pytest.mark.gpu, NEEDS_GPU])])
# Type of the model, and of autocast.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "fp16 autocast": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
}


class _Real:
    """A real GPU, with what tests ask of the pretended one; it is not asked where it makes the host wait."""

    @contextlib.contextmanager
    def watch(self) -> Iterator[Counter[Wait]]:
        yield Counter()


@contextlib.contextmanager
def gpu(device: str = "pretended", **options: Any) -> Iterator[Any]:
    if device == "real":
        yield _Real()
    else:
        with pretended_gpu(**options) as found:
            yield found


def autocast(dtype: torch.dtype | None, device: str = "cuda") -> Any:
    return torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None)


def moved(value: Any, device: str = "cuda") -> Any:
    """Tensors inside of `value` on the GPU, in any nest that is a pytree."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def explained(waits: Counter[Wait]) -> bool:
    """Whether every wait is at a line of the package that says so, by the comment ``host read``."""
    silent = [str(wait) for wait in waits if "host read" not in wait.source]
    assert not silent, "the host waits where the source does not say so (# host read: why):\n" + "\n".join(silent)
    return True


def examples(path: str, *names: str) -> tuple[Any, ...]:
    """What another test module defines."""
    with module_of(TESTS / path) as module:
        return tuple(getattr(module, name) for name in names)


Factory = Callable[[], Any]
