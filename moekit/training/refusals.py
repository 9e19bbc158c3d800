"""What cannot be right on divided weights, refused by name before training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moekit.errors import UserError
from moekit.training.callbacks.weights import AverageOfLast, MovingAverage

_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true", "64-true")
_OPTIMIZERS: dict[str, str] = {
    "LBFGS": "its line search adds up all parameters as one vector, which parameters of several meshes are not. Use "
    "torch.optim.AdamW or SGD",
    "Rprop": "torch picks out entries by their sign there, which divided tensors do not offer. Use torch.optim.AdamW "
    "or RMSprop",
    "SparseAdam": "gradients are summed over processes as dense tensors. Use torch.optim.Adam, and Embedding without "
    "sparse=True",
    "Adafactor": "torch's takes means over rows and columns in place, which divided tensors do not offer. Use "
    "moekit.training.adafactor.Adafactor, which is T5's",
}


def check_precision(plugin: Any) -> None:
    """Raise UserError for 16-mixed and plugins of other libraries, with which numbers would be wrong."""
    if plugin.precision not in _PRECISIONS:
        why = (
            "its loss scale would be lowered by the ranks that see an overflow and not by the others"
            if plugin.precision == "16-mixed"
            else "it exchanges layers for its own, which nobody divides"
        )
        raise UserError(
            f"ExpertParallelStrategy needs a precision among {', '.join(_PRECISIONS)}: got {plugin.precision}; {why}. "
            "Use bf16-mixed."
        )


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Raise UserError for `ModelPruning`, which exchanges parameters in training, and for averages of recipes."""
    for callback in callbacks:
        if isinstance(callback, MovingAverage | AverageOfLast):
            raise UserError(
                f"ExpertParallelStrategy cannot train with {type(callback).__name__}, which averages whole weights; "
                "here they are divided. Leave it out (train.ema 0, train.average_last 0), or train without "
                "the settings of strategy."
            )
        if isinstance(callback, ModelPruning):
            raise UserError(
                f"ExpertParallelStrategy cannot train with {type(callback).__name__}, which puts masked copies in the "
                "place of parameters that are divided among processes. Prune between runs: torch.nn.utils.prune before "
                "the Trainer, or whole experts with moekit.surgery."
            )


def check_batch_norms(module: nn.Module) -> None:
    """Raise UserError for a batch norm that ``sync_batchnorm=True`` would have to convert."""
    for name, norm in module.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
            raise UserError(
                f"sync_batchnorm=True is not supported by ExpertParallelStrategy, which would leave {name} to "
                "normalise each rank's batch by itself. Use a norm of one row (LayerNorm, RMSNorm), or call "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm on your model, on GPUs, and leave the argument out."
            )


def check_optimizer(optimizer: Optimizer, *, divided: bool) -> None:
    """Raise UserError for optimizers of torch that cannot step divided parameters, or not as they step whole ones.

    `divided` says whether data ranks update slices of what they repeat (ZeRO stage 1).
    """
    for name, why in _OPTIMIZERS.items():
        if isinstance(optimizer, getattr(torch.optim, name)):
            raise UserError(f"ExpertParallelStrategy cannot train with torch.optim.{name}: {why}.")
    if isinstance(optimizer, torch.optim.Muon):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if _is_cut(parameter, divided):
                raise UserError(
                    "torch.optim.Muon must see whole matrices: its update orthogonalises them, in bfloat16, and would "
                    f"differ with the number of processes; one of shape {tuple(parameter.shape)} is divided among "
                    "them. Use zero_stage=0 and tensor_parallel_size=1."
                )


def _is_cut(parameter: Tensor, divided: bool) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    mesh = parameter.device_mesh
    return any(mesh.size(n) > 1 and (divided or not p.is_replicate()) for n, p in enumerate(parameter.placements))
