"""Local views: while a module runs, its divided parameters are plain tensors that hold this rank's slice.

Parameters are DTensors for everybody who looks at the model: optimizers, checkpoints, clipping. A module's forward, be
it a user's, knows nothing of that. Hooks put a plain tensor under the parameter's name for the time of the forward;
gradients flow through it to the DTensor.

The view is also the one place where gradients get their factor. The all-to-all brings the rows of all ranks of an
expert group to one expert, so its gradient is the sum over them where a dense weight's is one rank's; averaging over
the ranks that hold the expert leaves it too large by the size of the expert group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.parallel.tensor_parallel import sum_gradient


@dataclass(frozen=True)
class LocalView:
    """How one parameter is seen in forward.

    Attributes:
        module: The module that holds the parameter.
        name: The name of the parameter in `module`.
        scale: A factor of the value: 1 / W for a bias that each of W partners adds to its part of a sum.
        gradient_scale: A factor of the gradient.
        groups: The groups over which the gradient is summed, for a parameter that ranks repeat but use on
            different data.
    """

    module: nn.Module
    name: str
    scale: float = 1.0
    gradient_scale: float = 1.0
    groups: tuple[dist.ProcessGroup, ...] = ()

    def __call__(self) -> Tensor:
        """The plain tensor."""
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        value = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if self.scale == 1.0 and self.gradient_scale == 1.0 and not self.groups:
            return value
        return sum_gradient(value, self.groups, scale=self.scale, gradient_scale=self.gradient_scale)


class LocalViews:
    """Hooks that show the local views of some parameters whenever `module` is called.

    To be made before `fully_shard` wraps the module: it puts its own hook, which gathers the weights, before the
    others, and releases them after ours.
    """

    def __init__(self, module: nn.Module, views: Sequence[LocalView]) -> None:
        self.views = tuple(views)
        self._shown: list[list[LocalView]] = []
        module.register_forward_pre_hook(self._show)
        module.register_forward_hook(self._hide, always_call=True)

    def _show(self, module: nn.Module, args: Any) -> None:
        shown = []
        for view in self.views:
            # Attributes of the instance are found before parameters. One that is there was put by an outer module.
            if view.name not in view.module.__dict__:
                view.module.__dict__[view.name] = view()
                shown.append(view)
        self._shown.append(shown)

    def _hide(self, module: nn.Module, args: Any, output: Any) -> None:
        for view in self._shown.pop() if self._shown else ():
            view.module.__dict__.pop(view.name, None)

    def renew(self) -> None:
        """Show anew what is shown: weights were gathered again since."""
        for view in (view for shown in self._shown for view in shown):
            view.module.__dict__[view.name] = view()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module is not sharded.
        return {"views": (), "_shown": []}
