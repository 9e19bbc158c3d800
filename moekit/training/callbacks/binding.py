"""The callback that every Trainer loads by itself: it gives nested components Trainer and step hook."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from moekit.component import Component, bind, components, unbind


class ComponentBinding(Callback):
    """Binds every `Component` below the LightningModule, and tells each when an optimizer step is done.

    Nothing happens for a model without components. The callback keeps no state of its own in checkpoints, and
    logs nothing. The entry point ``lightning.pytorch.callbacks_factory`` installs it in every Trainer of the
    environment; of several in one Trainer only the first acts.

    A step is a training batch in which at least one optimizer stepped: gradient accumulation makes several
    batches one step, and two optimizers that step in one batch make one step too (Lightning's `global_step`,
    which is passed on, counts both). `Component.on_step_end` runs in ``on_train_batch_end``, before any
    checkpoint callback, so that a checkpoint always holds what the hook changed.
    """

    def __init__(self) -> None:
        self._components: tuple[Component, ...] = ()
        self._last_step = 0

    def _bind(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bind(pl_module)
        if next(c for c in trainer.callbacks if isinstance(c, ComponentBinding)) is not self:  # type: ignore[attr-defined]
            return
        below = tuple(components(pl_module).values())
        self._components = (pl_module, *below) if isinstance(pl_module, Component) else below

    def _unbind(self, pl_module: L.LightningModule) -> None:
        unbind(pl_module)
        self._components = ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Bind what exists already, so that the user's own ``setup`` finds the Trainer."""
        self._bind(trainer, pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bind what ``setup`` and ``configure_model`` have added."""
        self._bind(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bind what ``setup`` and ``configure_model`` have added; inside `fit` a cheap repetition."""
        self._bind(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bind what ``setup`` and ``configure_model`` have added."""
        self._bind(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bind what ``setup`` and ``configure_model`` have added."""
        self._bind(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where the run starts: a resumed run has done these steps already."""
        self._bind(trainer, pl_module)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call `Component.on_step_end` once for every component if an optimizer has stepped in this batch."""
        if not self._components or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        for component in self._components:
            component.on_step_end(self._last_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Release the components: Lightning does not call ``teardown`` after an exception."""
        self._unbind(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the components plain modules again."""
        self._unbind(pl_module)


def default_callbacks() -> list[Callback]:
    """What Lightning adds to every Trainer where moekit is installed."""
    return [ComponentBinding()]
