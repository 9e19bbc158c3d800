"""What callbacks of Lightning, and functions of torch that users call, need to work on divided weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, StochasticWeightAveraging, WeightAveraging
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import register_sharding
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from moekit.parallel.checkpoint.checkpointer import PathLike
from moekit.parallel.gradients import norm_of, scale_to_norm
from moekit.parallel.sharding import sharded
from moekit.training.checkpoint_state import load_rest


def divide_averages(callbacks: Iterable[Callback], divide: Callable[[nn.Module], Any]) -> None:
    """Lay the copies that weight-averaging callbacks made of the model over the ranks as it is."""
    for callback in callbacks:
        average: Any = None
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average = callback._average_model.module
        elif isinstance(callback, StochasticWeightAveraging):
            average = callback._average_model
        if average is not None and sharded(average) is None:
            divide(average)


def restore_groups(trainer: L.Trainer, path: PathLike) -> None:
    """Give optimizers the parameter groups that a fine-tuning callback had added when the checkpoint was saved.

    Lightning's callbacks do it when fit begins, where a strategy that divides the model has not read it yet.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            state = load_rest(path).get("callbacks", {}).get(callback.state_key)
            if state is not None:
                callback.load_state_dict(state)
                callback.on_fit_start(trainer, trainer.lightning_module)


@contextmanager
def on_several_meshes(*, anomaly: bool = False) -> Iterator[None]:
    """For the time of a fit: what compares or adds up parameters takes those of several meshes.

    - `torch.nn.utils.clip_grad_norm_` finds the norm of one process. Other tensors' norms are found as ever.
    - Lightning's fine-tuning callbacks tell parameters that an optimizer has by identity, not by comparing values.

    Args:
        anomaly: also let autograd's search for NaN look at divided gradients.
    """
    if anomaly:
        # torch's test for NaN gathers each divided gradient: it does not know by itself, and that is the mode's price.
        register_sharding(torch.ops.aten._is_any_true.default)(lambda x: [([Replicate()], [Replicate()])])
    norm, scale = clip_grad._get_total_norm, clip_grad._clip_grads_with_norm_
    known = BaseFinetuning.__dict__["filter_on_optimizer"]

    def total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if not any(isinstance(tensor, DTensor) for tensor in found):
            return norm(found, norm_type, error_if_nonfinite, foreach)
        total = norm_of(found, norm_type)
        if error_if_nonfinite and not bool(total.isfinite()):
            raise RuntimeError(f"the norm of all gradients must be finite to clip them: got {float(total)}.")
        return total

    def scale_all(parameters: Any, max_norm: float, total_norm: Tensor, foreach: bool | None = None) -> None:
        found = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if any(isinstance(parameter, DTensor) for parameter in found):
            scale_to_norm(found, max_norm, total_norm)
        else:
            scale(found, max_norm, total_norm, foreach)

    clip_grad._get_total_norm, clip_grad._clip_grads_with_norm_ = total_norm, scale_all
    BaseFinetuning.filter_on_optimizer = staticmethod(_not_known)  # type: ignore[method-assign]
    try:
        yield
    finally:
        clip_grad._get_total_norm, clip_grad._clip_grads_with_norm_ = norm, scale
        BaseFinetuning.filter_on_optimizer = known  # type: ignore[method-assign]


def _not_known(optimizer: Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    params = list(params)
    new = [parameter for parameter in params if id(parameter) not in known]
    if len(new) < len(params):
        rank_zero_warn(
            f"{len(params) - len(new)} of the parameters to be unfrozen are in the optimizer already and stay in their "
            "group. Make the optimizer over those that require a gradient."
        )
    return new
