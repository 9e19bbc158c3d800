"""Writing with a run whose experts are divided among several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moekit.runs.config import RunConfig
from moekit.runs.writer import Writer, Written
from moekit.training.processes import explained, let_survivors_tell
from moekit.training.quiet import quiet
from moekit.training.strategy import ExpertParallelStrategy

_LOST = "the others cannot write without it. Start again."


def write_together(
    writer: Writer, config: RunConfig, lines: Sequence[str], write: Callable[[Sequence[str]], Written]
) -> Written:
    """Write with all processes of `config`, each of which holds a part of the experts.

    Every process goes through all lines: a sparse layer computes only where all call it. All of them choose tokens by
    the first one's scores and seed, so they take the same steps, and write what one process would.

    Args:
        writer: what writes in this process, whose model the strategy divides.
        config: says how many processes, and by its strategy what they divide; without one the experts, and all weights
            by ZeRO stage 3.
        lines: what is written for; those of the first process count.
        write: writes for lines with the writer.

    Raises:
        UserError: the model cannot be divided so.
        TrainingStoppedError: a process has ended.
    """
    asked = config.strategy.strategy()
    strategy = ExpertParallelStrategy() if asked == "auto" else asked
    module = _Writing(writer, lines, write)
    strategy.check(module, config.train.devices)
    # One process writes in the precision of the weights, without a Trainer that would cast them.
    train = config.changed(train={"precision": "32-true"}).train
    trainer = train.trainer(
        strategy=strategy, logger=False, enable_checkpointing=False, enable_progress_bar=False, inference_mode=False
    )
    one: Any = DataLoader([0], batch_size=None)  # type: ignore[arg-type]
    with quiet(), explained(trainer, _LOST):
        trainer.predict(module, one, return_predictions=False)
    assert module.written is not None
    return module.written


class _Writing(L.LightningModule):
    """Writes everything in its only step."""

    written: Written | None = None

    def __init__(self, writer: Writer, lines: Sequence[str], write: Callable[[Sequence[str]], Written]) -> None:
        super().__init__()
        self.backbone = writer.model
        self._writer, self._lines, self._write = writer, lines, write

    def on_predict_start(self) -> None:
        let_survivors_tell()

    def predict_step(self, batch: object, batch_idx: int) -> None:
        self._writer.model = _Together(self.backbone)
        sampling = None if self._writer.sampling is None else self._writer.sampling.seeded()
        # Processes that drew by seeds of their own would part.
        lines, self._writer.sampling = self.trainer.strategy.broadcast((list(self._lines), sampling), 0)
        self.written = self._write(lines)


class _Together(nn.Module):
    """The divided model as `moekit.inference` sees it, with the scores of the first process."""

    inference_mode = False  # weights are gathered and let go

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def new_cache(self) -> Any:
        return self.backbone.new_cache()

    def encode(self, *args: Any) -> Any:
        return self.backbone.encode(*args)

    def decode(self, *args: Any) -> Any:
        return self.backbone.decode(*args)

    def logits(self, hidden: Tensor) -> Tensor:
        # Rows of a product may differ in their last bits by their place in it, and a tie would part the processes.
        logits: Tensor = self.backbone.logits(hidden).contiguous()
        dist.broadcast(logits, src=0)
        return logits
