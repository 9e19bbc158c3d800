"""What a strategy does with optimizers of a divided model: taking them over, their step, and clipping."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moekit.parallel.gradients import clip_by_norm, clip_by_value, gradient_norm
from moekit.parallel.layout import Offload
from moekit.parallel.master_weights import MasterWeights
from moekit.parallel.optimizer_rebinding import rebind_optimizer
from moekit.parallel.sharding import ShardedModel
from moekit.parallel.unused_gradients import drop_unused_gradients, used_somewhere
from moekit.training.lightning_callbacks import on_several_meshes, restore_groups
from moekit.training.refusals import check_optimizer
from moekit.training.strategy_checkpoint import ShardedCheckpointStrategy
from moekit.training.strategy_steps import SteppingStrategy

NonFinite = Literal["raise", "skip"]


class OptimizingStrategy(ShardedCheckpointStrategy, SteppingStrategy):
    """Optimizers, whenever they were made, step a divided model; the base of `ExpertParallelStrategy`.

    Args:
        nonfinite_gradients: what to do when the gradient norm is NaN or infinite: "raise", or "skip" the step.
        **kwargs: for `ShardedCheckpointStrategy`.

    Attributes:
        skipped_steps: how often a step was left out.
    """

    zero_stage: Literal[0, 1, 2, 3]
    offload: Offload
    sharded: ShardedModel | None

    def __init__(self, nonfinite_gradients: NonFinite = "raise", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if nonfinite_gradients not in ("raise", "skip"):
            raise ValueError(f'nonfinite_gradients must be "raise" or "skip": got {nonfinite_gradients!r}.')
        self.nonfinite_gradients = nonfinite_gradients
        self.skipped_steps = 0
        self._for_fit = ExitStack()
        self._norm: Tensor | None = None  # of the gradients that are about to be clipped

    # -- before training --------------------------------------------------------------------------------------------

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Make the optimizers, or carry over those there are; give them slices or host copies if the layout says so."""
        self._for_fit.enter_context(on_several_meshes(anomaly=trainer._detect_anomaly))
        super().setup_optimizers(trainer)
        divide = self.zero_stage == 1
        for optimizer in map(_own, self.optimizers):
            self._take_over(optimizer)
            check_optimizer(optimizer, divided=divide)
            if divide or self.offload == "optimizer":
                device = torch.device("cpu") if self.offload == "optimizer" else None
                MasterWeights.of(optimizer, divide=divide, device=device)
        self.optimizers = self.optimizers  # Lightning's wrappers hold copies of the attributes

    def _take_over(self, optimizer: Optimizer) -> None:
        """Let an optimizer that knows parameters from before the model was divided work on what is there now."""
        assert self.sharded is not None
        if not isinstance(optimizer, _MockOptimizer):
            rebind_optimizer(optimizer, self.sharded)

    def _take_over_clipping(self) -> None:
        """Precision plugins clip with a function that refuses parameters of several meshes."""
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = self._clip_by_norm
        plugin.clip_grad_by_value = self._clip_by_value

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As its parent, for optimizers with the groups that they had."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            restore_groups(self.lightning_module.trainer, checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def teardown(self) -> None:
        """Wait for a checkpoint that is being written; give back what was lent for the fit."""
        self._for_fit.close()
        super().teardown()

    # -- steps ------------------------------------------------------------------------------------------------------

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute gradients, look at their norm on all ranks together, step."""
        if any(not isinstance(p, DTensor) for p in _parameters(optimizer)):  # groups that joined since
            self._take_over(_own(optimizer))

        def with_norm() -> Any:
            result = closure()
            self._look_at_gradients(optimizer)
            return result

        try:
            result = super().optimizer_step(optimizer, with_norm, model, **kwargs)
        finally:
            self._norm = None
        if self.lightning_module is not None and not self.lightning_module.automatic_optimization:
            assert self.sharded is not None
            self.sharded.release_weights()  # what was gathered, perhaps after backward, is that of before the step
            self._left_behind = True
        return result

    def _look_at_gradients(self, optimizer: Optimizer) -> None:
        self._meet("the optimizer's step")
        parameters = _parameters(optimizer)
        used, norm = used_somewhere(parameters), gradient_norm(parameters)
        module = self.lightning_module
        assert module is not None
        module.log("train/grad_norm", norm, batch_size=1)
        # No weight may become NaN, and an optimizer leaves alone what has no gradient.
        *some, finite = torch.cat([used, norm.isfinite().to(used)[None]]).tolist()  # host read: the one of a step
        drop_unused_gradients(parameters, some)
        if finite:
            self._norm = None if self._hooks_look() else norm
            return
        step = module.trainer.global_step
        if self.nonfinite_gradients == "raise":
            raise FloatingPointError(
                f"the gradient norm must be finite: it is {float(norm)} in step {step}, on all ranks. Lower the "
                'learning rate, or use nonfinite_gradients="skip".'
            )
        self.skipped_steps += 1
        for parameter in parameters:
            parameter.grad = None

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_norm(_parameters(optimizer), clip_val, norm=self._norm)

    def _hooks_look(self) -> bool:
        """Whether a hook may change gradients between the look at their norm and their clipping; so on all ranks."""
        module = self.lightning_module
        assert module is not None
        hook, clipping = "on_before_optimizer_step", "configure_gradient_clipping"
        callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
        return any(is_overridden(hook, callback, parent=L.Callback) for callback in callbacks) or any(
            is_overridden(name, module, parent=L.LightningModule) for name in (hook, clipping)
        )

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_value(_parameters(optimizer), clip_val)


def _own(optimizer: Any) -> Any:
    """The user's optimizer in Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """What an optimizer works on."""
    return [parameter for group in _own(optimizer).param_groups for parameter in group["params"]]
