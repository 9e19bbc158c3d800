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
        model: any module with `MoELayer` inside. Experts that other processes hold are not among them: of a layer that
            does not hold all of its experts nothing is returned.

    Returns:
        Float32[E] by layer, in host memory; layers without a gradient are left out.
    """
    found = {}
    for name, layer in named_layers(model).items():
        squares = torch.zeros(layer.num_experts, dtype=torch.float64)
        seen, whole = False, True
        for bank in layer.experts.modules():
            axes = getattr(bank, "axes", {})
            for own, parameter in bank.named_parameters(recurse=False):
                gradient, names = parameter.grad, axes.get(own, ())
                if gradient is None or "expert" not in names:
                    continue
                if isinstance(gradient, DTensor) or gradient.shape[names.index("expert")] != layer.num_experts:
                    whole = False
                    continue
                rows = gradient.movedim(names.index("expert"), 0).flatten(1)
                squares += rows.float().square().sum(1).double().cpu()  # host read: to be written
                seen = True
        if seen and whole:
            found[name] = squares.sqrt().float()
    return found
