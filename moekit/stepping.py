"""Steps without Lightning: hear what routers return in training, and tell components when an optimizer step is done.

`moekit.training.callbacks.binding` does the same for every Trainer of Lightning, with the functions of this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from moekit.component import Component, components

_PATIENCE = 10  # updates of the weights; a training step of several optimizers makes a few, no one makes so many


class StepWatch:
    """Warns once where a module's weights are updated again and again while its own step stands.

    Nothing is counted by forward: what is compared are the clocks that torch keeps in every tensor, the number of
    writes into it. They tell an optimizer step from gradient accumulation, and are the same when activation
    checkpointing runs forward again.
    """

    def __init__(self) -> None:
        self._weights = self._state = -1
        self._updates = 0
        self._warned = False

    def see(self, module: nn.Module, weights: Iterable[Tensor], state: int) -> None:
        """Look at the clocks of `weights` in a training forward; `state` changes with every step told to `module`."""
        now = sum(writes(weight) for weight in weights if weight.requires_grad)
        if state != self._state:
            self._state, self._weights, self._updates = state, now, 0
        elif now != self._weights:
            self._weights, self._updates = now, self._updates + 1
        if self._updates >= _PATIENCE and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(module).__name__} moves with every optimizer step, and nobody tells it of steps: its weights "
                f"were updated {_PATIENCE} times, its state stood still. In a loop of your own call "
                "moekit.listen(model) before it and moekit.step_end(model) after every optimizer.step(); for the "
                "Trainer of transformers add moekit.training.callbacks.huggingface.StepEndCallback(). Lightning's "
                "Trainers do it by themselves where moekit is installed, by its entry points.",
                stacklevel=2,
            )


def writes(tensor: Tensor) -> int:
    """How often `tensor` was written to; 0 where torch does not count, as in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


class _Ear:
    """What one router returned in training and has not been told yet."""

    def __init__(self, router: nn.Module) -> None:
        self.pending: list[Any] = []
        self.passed = False
        hooks: tuple[dict[int, Any], ...] = (router._forward_pre_hooks, router._forward_hooks)
        for registered in hooks:
            for number, hook in list(registered.items()):
                if hook in (_turn, _hear):  # of a router that this one is a copy of
                    del registered[number]
        self.handles: tuple[RemovableHandle, ...] = (
            router.register_forward_pre_hook(_turn),
            router.register_forward_hook(_hear),
        )

    def backward_passed(self, gradient: Tensor) -> None:
        self.passed = True

    def tell(self, router: Any) -> None:
        heard, self.pending, self.passed = self.pending, [], False
        for routing in heard:
            router.observe(routing)


def in_backward() -> bool:
    """Whether this is the second forward of activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


@torch.compiler.disable
def _turn(router: Any, arguments: Any) -> None:
    """Before the first forward after a backward: nothing of the last micro-batch will be computed again."""
    ear: _Ear | None = router._ear
    if ear is not None and ear.passed and router.training and not in_backward():
        ear.tell(router)


@torch.compiler.disable
def _hear(router: Any, arguments: Any, routing: Any) -> None:
    """Keep a routing until its backward is done; the autograd graph goes free."""
    ear: _Ear | None = router._ear
    if ear is None or not router.training or router.frozen:
        return
    if in_backward():
        ear.passed = True
        return
    ear.pending.append(_pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, routing))
    for tensor in (routing.weight, *routing.losses.values()):
        if tensor.requires_grad:
            tensor.register_hook(ear.backward_passed)


def _observing(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if getattr(module, "observes", False) and hasattr(module, "_ear"))


def listen(model: nn.Module) -> None:
    """Hear from now on what the routers of `model` return in training, so that `step_end` can act on it.

    Call it once, before the first forward of a training loop of your own. Routers that count their load
    (`moekit.routing.Router.observe`) are then told every routing of a forward in training mode once: in `step_end`, or
    after its backward when the next micro-batch comes. Forwards that are not for training belong into ``model.eval()``.
    A second call changes nothing. `torch.compile` breaks its graph at routers that are listened to.

    Args:
        model: a router, a layer or a whole model, wrapped (by Fabric, DDP, ...) or not.
    """
    for router in _observing(model):
        if router._ear is None:
            router._ear = _Ear(router)


def stop_listening(model: nn.Module) -> None:
    """Undo `listen`; what was heard and not told is forgotten."""
    for router in _observing(model):
        if router._ear is not None:
            for handle in router._ear.handles:
                handle.remove()
            router._ear = None


def forget(model: nn.Module) -> None:
    """Forget what was heard and not told: forwards that were no training."""
    for router in _observing(model):
        if router._ear is not None:
            router._ear.pending, router._ear.passed = [], False


def tell_routings(model: nn.Module) -> None:
    """Tell routers what they returned, after the backward of a micro-batch; `step_end` does so too."""
    for router in _observing(model):
        if router._ear is not None:
            router._ear.tell(router)


def step_end(model: nn.Module, step: int | None = None) -> None:
    """Tell everything in `model` that moves with time that an optimizer step is done.

    Call it after every ``optimizer.step()`` of a training loop of your own, in all processes alike; Fabric's users too.
    Under Lightning's Trainers it happens by itself, under transformers' Trainer by
    `moekit.training.callbacks.huggingface.StepEndCallback`.

    Args:
        model: a router, a layer or a whole model, wrapped (by Fabric, DDP, ...) or not: everything inside is reached.
        step: optimizer steps taken so far, the one just done included. None = one more than at the last call, which
            begins at 0, or where a router's own state says it stands. A loop that goes on from a checkpoint should say
            its step. 0 = none is done yet: only begins to listen.

    Raises:
        ValueError: if `step` is negative.

    Warns:
        UserWarning: if routers that count their load were not listened to before (`listen`): the load of the steps
            before is unknown, and this step moves nothing of theirs.
    """
    if step is not None and step < 0:
        raise ValueError(f"step is the number of optimizer steps taken, 0 or more: got {step}.")
    parts = [module for module in (model, *components(model).values()) if isinstance(module, Component)]
    unheard = {type(r).__name__ for r in _observing(model) if r._ear is None and r.training and not r.frozen}
    listen(model)
    if step == 0:
        return
    if unheard:
        warnings.warn(
            f"step_end was called before listen, so what {', '.join(sorted(unheard))} returned until now is unknown. "
            "Call moekit.listen(model) once, before the first forward.",
            stacklevel=2,
        )
    if step is None:
        step = 1 + max((part.steps_done for part in parts), default=0)
    tell_routings(model)
    for part in parts:
        if not part.frozen:
            part.on_step_end(step)
            part._steps_told = step
