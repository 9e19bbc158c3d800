"""`RoutingMonitor`: sparse layers, loss and gradient norm are watched in training, and somebody is warned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from moekit.atomic import write_json
from moekit.errors import TrainingStoppedError
from moekit.parallel.gradients import gradient_norm
from moekit.training.callbacks.non_finite import NonFinite, kept
from moekit.training.metrics.routing import RoutingStatistics
from moekit.training.monitoring import MonitorWarning, Thresholds, TrainingWatch, Warned
from moekit.training.monitoring.watch import OnSpike, OnTrouble, check_reactions


class RoutingMonitor(Callback):
    """Watches every `MoELayer`, the loss and the gradient norm of any LightningModule, and warns.

    ``L.Trainer(callbacks=[RoutingMonitor()])`` is all, under any strategy; models of transformers that were adopted
    have such layers. It warns of

    - dead experts, a router that has collapsed, dropped assignments and large logits, over a window of steps;
    - a loss or gradient norm far above its running median: a spike;
    - a router whose balance loss weighs nothing, that is, whose gradient is 0.

    Each warning names layer, number, threshold and what to do, and is said once per layer and kind, again after it went
    away. Its state is in checkpoints: a resumed run warns as one that was never stopped.

    Every look logs ``train/routing/<name>`` and ``train/routing/<layer>/<name>`` of the steps since the last one: what
    `RoutingStatistics` defines, and of each layer ``logsumexp`` of the router's logits, ``expert_gradient_norm`` of all
    experts together and ``expert_gradient_max_ratio``, the largest norm of an expert over their mean. Names that the
    module logs by itself, as `MultitaskModule` does, are left to it. Once there were warnings it also logs their number
    so far, ``train/warnings``. Progress bars show ``dead_experts`` and ``max_load``, in fair shares.

    Numbers of training are not changed, but where a step is left out. Processes are added up. The host reads at each
    look; with `on_spike` "skip" or "stop" once more in every step, before the optimizer. A step that is left out
    changes no weight and no optimizer state, on any process; schedules move on. The norm of gradients is that of
    `NonFinite` or `moekit.ExpertParallelStrategy` where there is one of these, else it is computed in every step.

    Args:
        thresholds: from where on somebody is warned; None = the defaults of `Thresholds`.
        every_n_steps: optimizer steps between two looks; None = the Trainer's ``log_every_n_steps``.
        on_spike: "warn"; "skip" leaves out the step, and stops after 10 in a row; "stop" leaves it out and stops.
        on_dead: "warn" or "stop".
        on_collapse: the same.
        file: gets all warnings as JSON; None = none.
        say: gets the text of each warning in the first process; None = `warnings.warn` with `MonitorWarning`.

    Attributes:
        watch: the `TrainingWatch`; None before training.

    Raises:
        ValueError: a number of steps or a reaction that is none.
        TrainingStoppedError: at the end of `fit`, on all processes, where training was to stop: it has ended in order
            before, with validation, checkpoints and logs.
    """

    keeps_gradients = True  # of a step that is made: their norm stays what it is

    def __init__(
        self,
        thresholds: Thresholds | None = None,
        *,
        every_n_steps: int | None = None,
        on_spike: OnSpike = "warn",
        on_dead: OnTrouble = "warn",
        on_collapse: OnTrouble = "warn",
        file: str | Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        check_reactions(1 if every_n_steps is None else every_n_steps, on_spike, on_dead, on_collapse)
        self.thresholds, self.every_n_steps = thresholds, every_n_steps
        self.on_spike, self.on_dead, self.on_collapse = on_spike, on_dead, on_collapse
        self.file = None if file is None else Path(file)
        self._say = say or _warn
        self.watch: TrainingWatch | None = None
        self._loaded: dict[str, Any] | None = None
        self._left_out = False

    @classmethod
    def of(cls, settings: Mapping[str, Any], file: Path, say: Callable[[str], None]) -> RoutingMonitor:
        """From settings by name: those of `Thresholds`, the reactions, and ``every``, where 0 = as the Trainer logs."""
        given = dict(settings)
        every = given.pop("every") or None
        reactions = {name: given.pop(name) for name in ("on_spike", "on_dead", "on_collapse")}
        return cls(Thresholds(**given), every_n_steps=every, file=file, say=say, **reactions)

    @property
    def warned(self) -> list[Warned]:
        """All warnings so far, those before a resume included."""
        return [] if self.watch is None else list(self.watch.said.warned)

    # -- training ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        self.watch = TrainingWatch(
            pl_module,
            self.thresholds,
            every=self.every_n_steps or max(1, int(getattr(trainer, "log_every_n_steps", 50))),
            on_spike=self.on_spike,
            on_dead=self.on_dead,
            on_collapse=self.on_collapse,
            processes=trainer.world_size,
            timeout=getattr(trainer.strategy, "_timeout", None) or default_pg_timeout,
        )
        self.watch.hearing = False
        if self._loaded is not None:
            self.watch.load(self._loaded)
        self._write(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.hearing = True

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.watch is not None and loss.numel() == 1:
            self.watch.add_loss(loss)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert self.watch is not None
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = _norm(trainer, parameters)
        numbers = [number for number, one in enumerate(trainer.optimizers) if one is optimizer]
        if self.watch.before_step(_step(trainer), norm, numbers[0] if numbers else 0):
            for parameter in parameters:
                parameter.grad = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        watch = self.watch
        assert watch is not None
        watch.hearing = False
        if trainer.fit_loop._should_accumulate():
            return
        step, skipped = _step(trainer), watch.skipped
        self._tell(trainer, watch.after_step(step))
        if watch.due(step) and watch.values:
            self._log(trainer, pl_module, watch, step)
        if skipped:
            pl_module.log("train/spikes_skipped", float(skipped), batch_size=1)
        if watch.stopping:
            trainer.should_stop = True

    def _log(self, trainer: L.Trainer, module: L.LightningModule, watch: TrainingWatch, step: int) -> None:
        own = getattr(module, "train_routing", None)
        theirs = own.log_names() if isinstance(own, RoutingStatistics) else frozenset()
        values = {f"train/{name}": value for name, value in watch.values.items() if name not in theirs}
        if self.warned:
            values["train/warnings"] = float(len(self.warned))
        module.log_dict(values, batch_size=1)
        if "routing/dead_experts" in watch.values:
            short = {"dead_experts": watch.values["routing/dead_experts"]}
            short["max_load"] = max(v for name, v in watch.values.items() if name.endswith("/load_max_ratio"))
            module.log_dict(short, prog_bar=True, logger=False, batch_size=1)
        if not trainer._logger_connector.should_update_logs:  # Lightning writes at other steps
            for logger in trainer.loggers:
                logger.log_metrics(values, step - 1)

    def text(self) -> str:
        """For a progress bar, such as ``2 dead  busiest 3.1x``; "" before the first look, and for dense models."""
        values = {} if self.watch is None else self.watch.values
        if "routing/dead_experts" not in values:
            return ""
        dead, most = values["routing/dead_experts"], max(v for n, v in values.items() if n.endswith("/load_max_ratio"))
        return f"{f'{dead:.0f} dead  ' if dead else ''}busiest {most:.1f}x"

    # -- warnings ------------------------------------------------------------------------------------------------------

    def _tell(self, trainer: L.Trainer, found: list[Warned]) -> None:
        if not found:
            return
        self._write(trainer)
        if trainer.is_global_zero:
            for one in found:
                self._say(f"step {one.step}: {one.text}")

    def _write(self, trainer: L.Trainer) -> None:
        """All warnings, if there are any, or a file of another beginning of this run."""
        if self.file is not None and trainer.is_global_zero and (self.warned or self.file.exists()):
            write_json(self.file, {"warnings": [one.plain() for one in self.warned]})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.watch is not None and self.watch.stopping:
            raise TrainingStoppedError(
                f"training stopped after step {trainer.global_step}: {self.watch.stopping} {kept(trainer)}".strip()
            )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read what was counted so far, which all processes do together."""
        if self.watch is None or trainer.state.fn != "fit":
            return
        self.watch.fold()
        checkpoint.setdefault("callbacks", {})[self.state_key] = self.watch.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()


def _step(trainer: L.Trainer) -> int:
    """The number of the step under way, from 1, as loggers count."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped + 1


def _norm(trainer: L.Trainer, parameters: list[Any]) -> Tensor | None:
    """The norm of the gradients as somebody has found it, or anew; None where a step has none."""
    if not parameters:
        return None
    if getattr(trainer.strategy, "inspects_gradients", False):
        return getattr(trainer.strategy, "gradient_norm", None)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    known = (one.seen_norm(parameters) for one in callbacks if isinstance(one, NonFinite))
    found = next((norm for norm in known if norm is not None), None)
    return gradient_norm(parameters) if found is None else found


def _warn(text: str) -> None:
    warnings.warn(text, MonitorWarning, stacklevel=2)
