"""Writing text inside training, where the processes of a divided model have to take the same steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from moekit.data.batch import Batch
from moekit.training.agreement import agree


class WrittenTogether:
    """Written answers whose every decoding step is one of all processes of the Trainer.

    A layer whose experts, or whose weights, are on several processes computes only where all call it. Texts end at
    different steps, so a process whose own have ended goes on with a row that nobody reads until all have ended; one
    without a sentence has such a row from the beginning. Processes ask each other at every step through host memory.

    All processes must call `batch` equally often.

    Args:
        module: whose ``backbone`` writes; it must be attached to a Trainer.
        make: makes what turns batches into text, of the model that it is given.
    """

    def __init__(self, module: L.LightningModule, make: Callable[[nn.Module], Any]) -> None:
        self._model = _InStep(module)
        self._writer = make(self._model)

    def batch(self, batch: Batch) -> list[str]:
        """One answer for every row of ``batch.source``."""
        written: list[str] = self._writer.batch(batch if len(batch) else _stand_in(batch))
        self._model.wait_for_others()
        return written[: len(batch)]

    def text(self, ids: Tensor) -> list[str]:
        """The sentences of Int64[B, T] token ids."""
        texts: list[str] = self._writer.text(ids)
        return texts


class _InStep(nn.Module):
    """The backbone as `moekit.inference` sees it."""

    module: L.LightningModule
    inference_mode = False  # weights gathered in inference mode could not be used in training again

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not as a part of this one
        self.backbone: Any = module.backbone
        self._row: tuple[Tensor, ...] = ()

    def new_cache(self) -> Any:
        return self.backbone.new_cache()

    def encode(self, ids: Tensor, mask: Tensor, language: Tensor) -> Any:
        encoded = self.backbone.encode(ids, mask, language)
        self._row = ids[:1, :1], encoded.hidden[:1], mask[:1], language[:1]
        return encoded

    def decode(self, *args: Any) -> Any:
        agree(self.module.trainer, True)
        return self.backbone.decode(*args)

    def logits(self, hidden: Tensor) -> Any:
        return self.backbone.logits(hidden)

    def wait_for_others(self) -> None:
        ids, memory, mask, language = self._row
        with torch.no_grad():
            while agree(self.module.trainer, False)[0] and self.module.trainer.world_size > 1:
                self.backbone.decode(ids, memory, mask, None, language, self.backbone.new_cache())


def _stand_in(batch: Batch) -> Batch:
    """A batch of one row, which nobody reads."""
    ids, mask, language = batch.source.new_ones(1, 1), batch.source_mask.new_ones(1, 1), batch.source_language
    return Batch(batch.task, ids, mask, None, None, None, language.new_zeros(1), language.new_zeros(1))
