"""The size of gradients at experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.routing_traces.recording import named_layers


@torch.no_grad()
def expert_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Norm of the gradient of every expert, over all tensors of its bank: between backward and the optimizer's step.

    Args:
        model: any module with `MoELayer` inside. Where its parameters are divided among processes, all of these call it
            together, and each gets the norms of all experts.

    Returns:
        Float32[E] by layer, in host memory. Layers without a gradient are left out, and so are tensors that not all
        experts have.
    """
    found: dict[str, Tensor] = {}
    for name, layer in named_layers(model).items():
        for bank in layer.experts.modules():
            axes = getattr(bank, "axes", {})
            for own, parameter in bank.named_parameters(recurse=False):
                gradient, names = parameter.grad, axes.get(own, ())
                if gradient is None or "expert" not in names:
                    continue
                others = [dimension for dimension, axis in enumerate(names) if axis != "expert"]
                rows = gradient.float().square()
                rows = rows.sum(others) if others else rows
                rows = rows.full_tensor() if isinstance(rows, DTensor) else rows
                if rows.numel() == layer.num_experts:
                    there = found.get(name)
                    found[name] = rows.double() if there is None else there + rows.double()
    if not found:
        return {}
    device = next(iter(found.values())).device
    norms = torch.cat([squares.to(device) for squares in found.values()]).sqrt().float().cpu()  # host read: all at once
    return dict(zip(found, norms.split([len(squares) for squares in found.values()]), strict=True))
