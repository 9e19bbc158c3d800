"""What of a module follows the device on which it computes, beside its divided weights."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric


@torch.no_grad()
def move_unsharded_state(model: nn.Module, device: torch.device) -> None:
    """Move to `device` what stays behind where a strategy puts the weights in their places and never calls ``to``.

    That is where weights are kept in host memory, or the model was built on the meta device. Moved are the states of
    metrics, which are neither parameters nor buffers, and buffers that no unit of `fully_shard` has moved. A shared
    buffer stays shared. `device` of LightningModules and metrics then says where batches are.
    """
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Metric):
            module.to(device)
        if isinstance(module, _DeviceDtypeModuleMixin):
            module._device = device
        for name, buffer in module._buffers.items():
            if buffer is None or isinstance(buffer, DTensor) or buffer.is_meta or buffer.device == device:
                continue
            if buffer not in moved:
                moved[buffer] = buffer.to(device)
            module._buffers[name] = moved[buffer]
