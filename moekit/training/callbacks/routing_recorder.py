"""Routing of training or validation batches, kept in a folder of traces."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from moekit.errors import UserError
from moekit.mechanisms import expert_gradients
from moekit.routing_traces import Recording, record

FOLDER = "routing_trace"


class RoutingRecorder(Callback):
    """Keeps what every router returned, now and then: one file for each recorded step, in one folder.

    ``L.Trainer(callbacks=[RoutingRecorder(every=100)])`` is all. `moekit.routing_traces.read_trace` reads the folder as
    one trace. Each file is whole or not there, so a run that was killed loses the step at which it was, and one that
    goes on adds to the folder. Of several processes each writes its own, and reading joins them.

    Args:
        folder: where; None = ``routing_trace`` in the Trainer's ``default_root_dir``.
        every: optimizer steps between records.
        steps: instead, the numbers of steps done before the batches that are recorded.
        of: "train" = the batches of the step, all that it accumulates, with the gradient norm of every expert before
            clipping; "valid" = the text of the validations in training that come at least `every` steps after the last
            recorded one, which is the same at every step, as saturation needs it.
        batches: the most batches of one record; None = all.
        weights: whether the combine weights are kept.

    Raises:
        UserError: `every` or `batches` is less than 1, `steps` is given for validations, or a file cannot be written.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every: int = 100,
        steps: Collection[int] | None = None,
        of: Literal["train", "valid"] = "train",
        batches: int | None = None,
        weights: bool = True,
    ) -> None:
        if every < 1 or (batches is not None and batches < 1):
            raise UserError(f"every and batches of a RoutingRecorder must be at least 1: got {every} and {batches}.")
        if of not in ("train", "valid"):
            raise UserError(f'a RoutingRecorder is of "train" or "valid": got {of!r}.')
        if steps is not None and of == "valid":
            raise UserError("steps of a RoutingRecorder are those of training batches: leave them out for validation.")
        self.folder, self.every, self.steps = folder, every, None if steps is None else frozenset(steps)
        self.of, self.batches, self.weights = of, batches, weights
        self._stack = contextlib.ExitStack()
        self._recording: Recording | None = None
        self._step, self._seen, self._last = -1, 0, -1

    @property
    def state_key(self) -> str:
        """One of several has its own."""
        return f"{type(self).__qualname__}({self.of})"

    def state_dict(self) -> dict[str, Any]:
        """The step of the last record."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = int(state_dict["last"])

    # -- training batches ----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        if self.of == "train" and step != self._step:
            self._close()
            if self._wants(step):
                self._open(trainer, pl_module, step)
        self._count_batch()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self.of == "train" and self._recording is not None:
            self._recording.end_forward(expert_gradients(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if self.of == "train" and self._recording is not None and trainer.global_step > self._step:
            self._close()

    def _wants(self, step: int) -> bool:
        return step in self.steps if self.steps is not None else step % self.every == 0

    # -- validation ----------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        due = self._last < 0 or trainer.global_step >= self._last + self.every
        if self.of == "valid" and fitting and due:
            self._open(trainer, pl_module, trainer.global_step)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self.of == "valid":
            self._count_batch()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.of == "valid":
            self._close()

    # -- files ---------------------------------------------------------------------------------------------------------

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        place = Path(trainer.default_root_dir) / FOLDER if self.folder is None else Path(self.folder)
        rank = f".rank{trainer.global_rank:05d}" if trainer.world_size > 1 else ""
        notes = {"processes": str(trainer.world_size), "of": self.of}
        made = record(pl_module, place / f"{step:09d}{rank}.npz", weights=self.weights, notes=notes)
        self._recording = self._stack.enter_context(made)
        self._recording.tell(step=step)
        self._step = self._last = step
        self._seen = 0

    def _count_batch(self) -> None:
        if self._recording is not None:
            self._recording.paused = self.batches is not None and self._seen >= self.batches
            self._seen += 1

    def _close(self) -> None:
        self._recording = None
        self._stack.close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._recording = None
        self._stack.__exit__(type(exception), exception, exception.__traceback__)
        self._stack = contextlib.ExitStack()
