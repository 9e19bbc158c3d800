"""What a strategy does with the optimizers of a sharded model: rebinding, the look at gradients, and clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moekit.parallel.gradients import clip_by_norm, clip_by_value, gradient_norm
from moekit.parallel.master_weights import MasterWeights
from moekit.parallel.optimizer_rebinding import rebind_optimizer
from moekit.parallel.sharding import ShardedModel
from moekit.parallel.unused_gradients import drop_unused_gradients, used_somewhere
from moekit.training.callbacks.non_finite import NonFinite
from moekit.training.refusals import check_optimizer

OnNonFinite = Literal["raise", "skip"]


class OptimizerSteps:
    """Lets optimizers, whenever they were made, step a sharded model.

    Args:
        nonfinite_gradients: What to do when the gradient norm is NaN or infinite: "raise", or "skip" the step.

    Raises:
        ValueError: If `nonfinite_gradients` is something else.
    """

    def __init__(self, nonfinite_gradients: OnNonFinite) -> None:
        if nonfinite_gradients not in ("raise", "skip"):
            raise ValueError(f'nonfinite_gradients must be "raise" or "skip": got {nonfinite_gradients!r}.')
        self.nonfinite_gradients = nonfinite_gradients
        self.skipped = 0  # steps so far
        self._norm: Tensor | None = None  # of the gradients that are about to be clipped
        self.norm: Tensor | None = None  # of those that were inspected, until the step is done

    def prepare(
        self, optimizers: Iterable[Any], sharded: ShardedModel, *, divide: bool, device: torch.device | None
    ) -> None:
        """Bind optimizers to the sharded parameters; give them master weights if the layout says so.

        Args:
            optimizers: The user's, or Lightning's wrappers of them.
            sharded: The model.
            divide: Whether data ranks divide the optimizer's work and state (ZeRO stage 1).
            device: The device to which the optimizer is offloaded; None = no offload.

        Raises:
            UserError: If an optimizer cannot step a sharded model, or has parameters that the model never had.
        """
        for optimizer in map(_unwrapped, optimizers):
            if not isinstance(optimizer, _MockOptimizer):
                rebind_optimizer(optimizer, sharded)
            check_optimizer(optimizer, divided=divide)
            if divide or device is not None:
                MasterWeights.of(optimizer, divide=divide, device=device)

    def bind_new_groups(self, optimizer: Optimizer, sharded: ShardedModel) -> None:
        """Bind an optimizer anew if groups of other parameters have joined it; refused as by `prepare`."""
        if any(not isinstance(parameter, DTensor) for parameter in _parameters(optimizer)):
            rebind_optimizer(_unwrapped(optimizer), sharded)

    def patch_clipping(self, precision_plugin: Any) -> None:
        """Replace the clipping functions of a precision plugin, which refuse parameters of several meshes."""
        precision_plugin.clip_grad_by_norm = self._clip_by_norm
        precision_plugin.clip_grad_by_value = self._clip_by_value

    def inspect_gradients(self, optimizer: Optimizer, module: L.LightningModule) -> None:
        """Log the gradient norm, and drop gradients of parameters that no rank has used; all ranks call it together.

        Where the Trainer has a `NonFinite` callback, that decides what becomes of a step that is not finite.

        Raises:
            FloatingPointError: If the norm is not finite, and the step is not to be skipped.
        """
        parameters = _parameters(optimizer)
        callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
        watch = next((callback for callback in callbacks if isinstance(callback, NonFinite)), None)
        loss = None if watch is None else watch.loss_flag()
        flags, norm = used_somewhere(parameters, loss), gradient_norm(parameters)
        self.norm = norm
        module.log("train/grad_norm", norm, batch_size=1)
        # No weight may become NaN, and an optimizer leaves alone what has no gradient.
        *some, finite = torch.cat([flags, norm.isfinite().to(flags)[None]]).tolist()  # host read: the one of a step
        if loss is not None and some.pop():  # the loss of a rank is not finite
            finite = 0.0
        drop_unused_gradients(parameters, some)
        if not finite and watch is not None:
            watch.react(module, parameters)
            return
        if finite:
            self._norm = None if _hooks_may_change_gradients(module) else norm
            return
        step = module.trainer.global_step
        if self.nonfinite_gradients == "raise":
            raise FloatingPointError(
                f"the gradient norm must be finite: it is {float(norm)} in step {step}, on all ranks. Lower the "
                'learning rate, or use nonfinite_gradients="skip".'
            )
        self.skipped += 1
        for parameter in parameters:
            parameter.grad = None

    def forget_norm(self) -> None:
        """After a step: the next gradients have another norm."""
        self._norm = self.norm = None

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_norm(_parameters(optimizer), clip_val, norm=self._norm)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_value(_parameters(optimizer), clip_val)


def _hooks_may_change_gradients(module: L.LightningModule) -> bool:
    """Whether a hook may change gradients between the look at their norm and their clipping; so on all ranks."""
    hook, clipping = "on_before_optimizer_step", "configure_gradient_clipping"
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    changing = [callback for callback in callbacks if not getattr(callback, "keeps_gradients", False)]
    return any(is_overridden(hook, callback, parent=L.Callback) for callback in changing) or any(
        is_overridden(name, module, parent=L.LightningModule) for name in (hook, clipping)
    )


def _unwrapped(optimizer: Any) -> Any:
    """The user's optimizer in Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in _unwrapped(optimizer).param_groups for parameter in group["params"]]
