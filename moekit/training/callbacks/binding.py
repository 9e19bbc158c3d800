"""The callback that every Trainer loads by itself: nested components get Trainer, step hook and news."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from moekit.component import Component, bind, components, unbind
from moekit.layer import MoELayer
from moekit.stepping import forget, listen, stop_listening, tell_routings


class ComponentBinding(Callback):
    """Binds every `Component` below the LightningModule, and tells each when an optimizer step is done.

    Nothing happens for a model without components. The callback keeps no state of its own in checkpoints, and
    logs nothing. The entry points of ``moekit_binding`` bring it into every Trainer of the environment, be it of
    ``lightning`` or of ``pytorch_lightning``; of several in one Trainer only the first acts.

    A step is a training batch in which at least one optimizer stepped: gradient accumulation makes several
    batches one step, and two optimizers that step in one batch make one step too (Lightning's `global_step`,
    which is passed on, counts both). Where the LightningModule has `steps_before`, of a run whose weights it started
    from, they are added, so that schedules of components go on; frozen components are told nothing.
    `Component.on_step_end` runs in ``on_train_batch_end``, before any checkpoint callback, so that a checkpoint always
    holds what the hook changed.

    Routers that observe (`moekit.routing.Router.observe`) are told there, just before, what their forwards returned in
    this batch: not in the recomputation of activation checkpointing, not in evaluation mode, not between batches. A
    forward hook on the router hears it (`moekit.stepping.listen`), at which `torch.compile` breaks its graph.

    Sparse layers that train in evaluation mode, as models of `from_pretrained` do until ``train()`` is called, are
    warned of when training starts.
    """

    def __init__(self) -> None:
        self._components: tuple[Component, ...] = ()
        self._observing: tuple[Component, ...] = ()
        self._last_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Bind what exists already, so that the user's own ``setup`` finds the Trainer."""
        self.on_fit_start(trainer, pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bind what ``setup`` and ``configure_model`` have added; before a validation inside `fit` it is repeated."""
        bind(pl_module)
        first = next((c for c in trainer.callbacks if isinstance(c, ComponentBinding)), self)  # type: ignore[attr-defined]
        if first is not self:
            return
        self._release()  # also of what has gone from the model since
        below = tuple(components(pl_module).values())
        self._components = (pl_module, *below) if isinstance(pl_module, Component) else below
        self._observing = tuple(c for c in self._components if getattr(c, "observes", False))
        for router in self._observing:
            listen(router)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def _release(self) -> None:
        for router in self._observing:
            stop_listening(router)
        self._components = self._observing = ()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)
        _warn_of_evaluation(self._components)
        self._last_step = trainer.global_step  # a resumed run has done these already

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """From here on forwards are training's; what was returned before is nobody's."""
        for router in self._observing:
            forget(router)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        for router in self._observing:
            tell_routings(router)
        if not self._components or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        before = getattr(pl_module, "steps_before", 0)
        for component in self._components:
            if not component.frozen:
                component.on_step_end(before + self._last_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")  # which Lightning does not call after an exception
        if isinstance(exception, IsADirectoryError) and exception.filename:
            _explain(exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        unbind(pl_module)
        self._release()


def _warn_of_evaluation(found: tuple[Component, ...]) -> None:
    """Lightning says how many modules are in evaluation, and not what sparse layers lack there."""
    still = [c for c in found if isinstance(c, MoELayer) and not c.training and not c.frozen]
    learning = [layer.path or "the model" for layer in still if any(p.requires_grad for p in layer.parameters())]
    if learning:
        rank_zero_warn(
            f"{len(learning)} sparse layers train in evaluation mode, {learning[0]} first: without dropout, jitter and "
            "training capacity, and an adopted model without its routers' loss. A model that was opened by "
            "from_pretrained or adopt_folder needs train(). Layers that are not to learn need requires_grad_(False)."
        )


def _explain(refused: IsADirectoryError) -> None:
    """Where a Trainer without the strategy was given a sharded checkpoint, say what to do."""
    from moekit.parallel.checkpoint import is_checkpoint  # which not every program with a Trainer needs

    if is_checkpoint(refused.filename):
        refused.add_note(
            f"{refused.filename} is a checkpoint of moekit.ExpertParallelStrategy. Give the Trainer that strategy, or "
            "plugins=[AtomicCheckpointIO()] of moekit.training.checkpoint_io, or make a file of it with "
            "moekit.training.whole_checkpoint.consolidate_checkpoint(folder, file)."
        )
