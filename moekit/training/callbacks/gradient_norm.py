"""The norm of all gradients, as clipping finds it."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from moekit.training.callbacks.non_finite import NonFinite

_EPS = 1e-6  # what torch's clipping adds to a norm before it divides by it


class GradientNorm(Callback):
    """Logs ``train/grad_norm``: the norm before clipping, which clipping computes and throws away.

    Nothing is computed for it, so a run that does not clip has none. Where `NonFinite` has just found the norm,
    clipping takes that, and the gradients are read once. `ExpertParallelStrategy` logs it by itself.
    """

    def __init__(self) -> None:
        self._norm: Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        plugin: Any = trainer.precision_plugin
        if "clip_grad_by_norm" in vars(plugin):
            return  # the strategy clips

        watch = next((one for one in trainer.callbacks if isinstance(one, NonFinite)), None)  # type: ignore[attr-defined]

        def clip(optimizer: Optimizer, clip_val: float) -> None:
            parameters = list(plugin.main_params(optimizer))
            norm = None if watch is None else watch.norm_of(parameters)
            if norm is None:
                self._norm = torch.nn.utils.clip_grad_norm_(parameters, clip_val)
                return
            self._norm = norm
            # On a device nobody looks, and gradients that are small enough are multiplied by 1.
            if norm.device.type != "cpu" or not bool(norm + _EPS <= clip_val):  # host read: in host memory alone
                torch.nn.utils.clip_grads_with_norm_(parameters, clip_val, norm)

        plugin.clip_grad_by_norm = clip

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._norm is not None and trainer._logger_connector.should_update_logs:
            pl_module.log("train/grad_norm", self._norm, batch_size=1)
            self._norm = None
