"""`TrainingWatch`: counts, spikes and thresholds together, for any training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

from moekit.mechanisms import expert_gradients
from moekit.parallel.host_memory import to_host
from moekit.parallel.mesh import host_group
from moekit.training.metrics.routing import RoutingStatistics
from moekit.training.monitoring.counts import LayerCounts, total
from moekit.training.monitoring.rules import (
    Kind,
    LayerFigures,
    Said,
    Thresholds,
    Warned,
    spike_text,
    troubles,
    unweighed,
)
from moekit.training.monitoring.spikes import MOST_IN_A_ROW, Spikes

OnSpike = Literal["warn", "skip", "stop"]
OnTrouble = Literal["warn", "stop"]
_LAYER_KINDS: tuple[Kind, ...] = ("dead", "collapse", "drops", "logits")
_ADVICE = (
    'Lower the learning rate, clip gradients, or look at the data of that step; on_spike="skip" leaves such steps out.'
)


class TrainingWatch:
    """Watches sparse layers, loss and gradient norm of a model in training, and warns.

    In a loop of one's own, with Fabric or without::

        watch = TrainingWatch(model)
        for step in range(1, steps + 1):
            loss = ...
            watch.add_loss(loss)  # of every micro-batch
            loss.backward()
            if watch.before_step(step, norm):  # whether the step is to be left out
                optimizer.zero_grad()
            optimizer.step()
            for warned in watch.after_step(step):
                print(warned.text)
        watch.close()

    All processes call it alike. The host reads every `every` steps; with `on_spike` "skip" or "stop" once more in every
    step, before the optimizer. Forwards that are not for training belong into ``model.eval()``.

    Args:
        model: any module; of one without `MoELayer` only loss and gradient norm are watched.
        thresholds: from where on somebody is warned; None = the defaults of `Thresholds`.
        every: optimizer steps between two looks.
        on_spike: what a spike leads to: "warn" says so at the next look; "skip" leaves the step out, and stops after
            10 in a row; "stop" leaves it out and stops.
        on_dead: what dead experts lead to.
        on_collapse: what a collapsed router leads to.
        processes: how many train together, over the default process group; None = all that it has.
        timeout: after which a process that waits for others gives up.

    Attributes:
        stopping: why training is to end now; "" = it goes on.
        skipped: steps left out so far.
        values: figures of the last look by name, ``routing/...``.
        statistics: `RoutingStatistics` of the last look; None without sparse layers or before.

    Raises:
        ValueError: `every` is less than 1, or a reaction is unknown.
        UserError: a device without float64.
    """

    def __init__(
        self,
        model: nn.Module,
        thresholds: Thresholds | None = None,
        *,
        every: int = 10,
        on_spike: OnSpike = "warn",
        on_dead: OnTrouble = "warn",
        on_collapse: OnTrouble = "warn",
        processes: int | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        check_reactions(every, on_spike, on_dead, on_collapse)
        self.thresholds, self.every = thresholds or Thresholds(), every
        self.on_spike: OnSpike = on_spike
        self._stops = {kind for kind, what in (("dead", on_dead), ("collapse", on_collapse)) if what == "stop"}
        self._model, self._timeout = model, timeout
        self._processes = _processes() if processes is None else processes
        self._counts = LayerCounts(model)
        self.hearing = True
        self.said = Said()
        self.stopping, self.skipped, self._in_a_row = "", 0, 0
        self.values: dict[str, float] = {}
        self.statistics: RoutingStatistics | None = None
        self.figures: list[LayerFigures] = []
        self._new: list[Warned] = []
        # The loss of this step; then losses, and norms by optimizer, that were not read yet, with their steps.
        self._loss: Tensor | None = None
        self._unread: list[tuple[int, str, Tensor]] = []
        self._gradients: dict[str, Tensor] = {}
        # Counts since the last look as far as they were read, and those of the looks in the window, with their steps.
        self._partial: list[Tensor] = []
        self._steps = 0
        self._window: deque[tuple[int, Tensor]] = deque()
        self._spikes: dict[str, Spikes] = {}

    @property
    def hearing(self) -> bool:
        """Whether forwards of training count."""
        return self._counts.hearing

    @hearing.setter
    def hearing(self, value: bool) -> None:
        self._counts.hearing = value

    @property
    def reads_every_step(self) -> bool:
        """Whether the host must know loss and norm before the optimizer steps."""
        return self.on_spike != "warn"

    # -- a step --------------------------------------------------------------------------------------------------------

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch to that of the step; scalar, as backward gets it."""
        value = loss.detach().to(torch.float64).reshape(())
        self._loss = value if self._loss is None else self._loss + value

    def due(self, step: int) -> bool:
        """Whether the host looks after this step."""
        return step % self.every == 0

    def before_step(self, step: int, norm: Tensor | None, optimizer: int = 0) -> bool:
        """Between backward and the optimizer's step.

        Args:
            step: number of the step, from 1.
            norm: scalar, the norm of all gradients; None = not known.
            optimizer: which one of several.

        Returns:
            Whether this step is to be left out: clear the gradients then. The same on all processes.
        """
        found: dict[str, Tensor] = {}
        if self._loss is not None:
            found["loss"] = self._loss
            self._loss = None
        if norm is not None:
            found[f"norm {optimizer}"] = norm.detach().to(torch.float64).reshape(())
        if self.due(step) and self._counts.layers:
            self._gradients |= expert_gradients(self._model)
        if not self.reads_every_step or not found:
            self._unread += [(step, name, value) for name, value in found.items()]
            return False
        values = self._mean(torch.stack(list(found.values())))
        spiked = any([self._judge(step, name, value) for name, value in zip(found, values, strict=True)])
        if spiked:
            self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
            if self.on_spike == "skip" and self._in_a_row >= MOST_IN_A_ROW:
                self.stopping = f"{self._in_a_row} steps in a row were spikes and were left out, the last is {step}."
        else:
            self._in_a_row = 0
        return spiked

    def _mean(self, values: Tensor) -> list[float]:
        """The means over all processes, by way of host memory: over nccl the host would wait for all kernels twice."""
        (found,) = to_host([values])  # host read: the one of a step
        if self._processes > 1:
            dist.all_reduce(found, group=host_group("monitoring", self._timeout))
        return [float(value) / self._processes for value in found.tolist()]

    def after_step(self, step: int) -> list[Warned]:
        """After the optimizer's step, or after one that was left out; what is to be said now."""
        self._steps += 1
        if self.due(step):
            self._look(step)
        found, self._new = self._new, []
        return found

    def _judge(self, step: int, name: str, value: float) -> bool:
        """Whether a loss or a norm is a spike; it is said."""
        is_loss = name == "loss"
        kind: Kind = "loss_spike" if is_loss else "gradient_spike"
        rule = self._spikes_of(name)
        spike = rule.see(value)
        done = {
            "warn": _ADVICE,
            "skip": f"The step was left out; so were {self.skipped + 1} in all.",
            "stop": "The step was left out. Lower the learning rate, clip gradients, or look at the data of that step.",
        }[self.on_spike]
        what = "loss" if is_loss else "gradient norm"
        text = None if spike is None else spike_text(what, step, spike, rule.factor, done)
        self._say(step, kind, "" if name in ("loss", "norm 0") else name.replace("norm", "optimizer"), text)
        if text is not None and self.on_spike == "stop":
            self.stopping = self.stopping or text
        return spike is not None

    def _spikes_of(self, name: str) -> Spikes:
        """Of the loss, or of the norm of an optimizer's gradients, which scatters more."""
        allowed = self.thresholds
        factor, least = (allowed.loss_spike, 0.1) if name == "loss" else (allowed.gradient_spike, 0.5)
        return self._spikes.setdefault(name, Spikes(factor, allowed.spike_window, least))

    def _say(self, step: int, kind: Kind, layer: str, text: str | None, patience: int = 0) -> None:
        warned = self.said.see(step, kind, layer, text, patience)
        if warned is not None:
            self._new.append(warned)
            if kind in self._stops:
                self.stopping = self.stopping or warned.text

    # -- looks ---------------------------------------------------------------------------------------------------------

    def fold(self) -> None:
        """Read what was counted and not read yet, of all processes together: at a look, and before a checkpoint."""
        counted = self._counts.take()
        unread, self._unread = self._unread, []
        parts = [] if counted is None else [counted]
        parts += [value.reshape(1) for _, _, value in unread]
        if not parts:
            return
        device = parts[-1].device  # that of the losses, where there are any: counts may not have begun
        packed = torch.cat([part.to(device) for part in parts])
        if self._processes > 1:
            dist.all_reduce(packed)
        (packed,) = to_host([packed])  # host read: every `every` steps, and for a checkpoint
        if counted is not None:
            self._partial.append(packed[: counted.numel()])
        values = packed[packed.numel() - len(unread) :].tolist()
        for (step, name, _), value in zip(unread, values, strict=True):
            self._judge(step, name, value / self._processes)

    def _look(self, step: int) -> None:
        """Close what was counted since the last look, and judge."""
        self.fold()
        since = total(self._partial)
        if since is None:
            self._steps = 0
            return
        self._window.append((self._steps, since))
        self._partial, self._steps = [], 0
        while sum(steps for steps, _ in self._window) - self._window[0][0] >= self.thresholds.window:
            self._window.popleft()
        whole = total(packed for _, packed in self._window)
        assert whole is not None
        full = sum(steps for steps, _ in self._window) >= self.thresholds.window
        self.figures = self._counts.figures(whole)
        for layer in self.figures:
            self._say(step, "balance_loss", layer.name, unweighed(layer))
            if full:
                found = dict(troubles(layer, self.thresholds))
                if step < 2 * self.thresholds.window:  # a healthy router is uneven too before it has learned to balance
                    found.pop("drops", None)
                for kind in _LAYER_KINDS:
                    self._say(step, kind, layer.name, found.get(kind), self.thresholds.window)
        self.statistics = self._counts.statistics(since)
        self.values = _values(self.statistics, self._counts.figures(since), self._gradients)
        self._gradients = {}

    # -- going on ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, once `fold` has been called: plain data and tensors, the same on all processes."""
        partial = total(self._partial)
        return {
            "layers": dict(self._counts.layers),
            "partial": partial,
            "steps": self._steps,
            "window": [[steps, packed] for steps, packed in self._window],
            "spikes": {name: rule.state() for name, rule in self._spikes.items()},
            "said": self.said.state(),
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; counts of a model with other layers are left out."""
        self.said.load(state["said"])
        self.skipped, self._in_a_row = int(state["skipped"]), int(state["in_a_row"])
        for name, values in state["spikes"].items():
            self._spikes_of(name).load(values)
        if dict(state["layers"]) != self._counts.layers:
            return
        self._steps = int(state["steps"])
        self._partial = [] if state["partial"] is None else [state["partial"].cpu().clone()]
        self._window = deque((int(steps), packed.cpu().clone()) for steps, packed in state["window"])

    def close(self) -> None:
        """Hear nothing more."""
        self._counts.close()


def check_reactions(every: int, on_spike: str, on_dead: str, on_collapse: str) -> None:
    """Raise ValueError for a number of steps or a reaction that is none."""
    if every < 1:
        raise ValueError(f"every must be at least 1 optimizer step: got {every}.")
    given = {"on_spike": (on_spike, OnSpike), "on_dead": (on_dead, OnTrouble), "on_collapse": (on_collapse, OnTrouble)}
    for name, (value, kind) in given.items():
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}: got {value!r}.")


def _values(
    statistics: RoutingStatistics, layers: Sequence[LayerFigures], gradients: Mapping[str, Tensor]
) -> dict[str, float]:
    """What is logged of a look: that of `RoutingStatistics.log_values`, and more of every layer.

    Of a layer that routed nothing, as one in evaluation mode, no figures of routing: they would read as a collapse.
    """
    idle = tuple(f"routing/{layer.name}/" for layer in layers if not layer.routed)
    shown = statistics.log_values() if len(idle) < len(layers) else {}
    values = {name: value for name, value in shown.items() if not name.startswith(idle)}
    summary = statistics.summary()["layers"]
    for layer in layers:
        found: dict[str, float | None] = {"logsumexp": layer.logsumexp}
        if layer.routed:
            found |= {name: summary[layer.name][name] for name in ("dead_experts", "load_entropy", "load_max_ratio")}
        if (norms := gradients.get(layer.name)) is not None:
            found["expert_gradient_norm"] = float(norms.square().sum().sqrt())
            found["expert_gradient_max_ratio"] = float(norms.max() / norms.mean()) if bool(norms.mean() > 0) else None
        values |= {f"routing/{layer.name}/{name}": float(v) for name, v in found.items() if v is not None}
    return values


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
