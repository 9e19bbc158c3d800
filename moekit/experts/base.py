"""What an expert bank is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moekit.component import Component
from moekit.kernels.gpu.backend import Backend
from moekit.kernels.grouped_mm import grouped_mm
from moekit.kernels.grouped_rows import repeat_rows


class Experts(Component, ABC):
    """A bank of E experts of one shape.

    Subclass it, set `num_experts` and `dim`, compute rows that a dispatcher has already grouped by expert, and name
    the logical axes of every parameter so that it can be sharded without a change to `forward`.

    Attributes:
        axes: logical axes of each parameter, outermost first (``expert``, ``embed``, ``mlp``).
        matrices: names of the parameters Float[E, I, O] that `forward` multiplies with through `times` alone: these can
            be given low-rank adapters.
        outputs_first: whether `matrices` lie as Float[E, O, I].
        outputs: names of the parameters, all of them drawn at random, in which the bank's output is linear: those
            whose first draw `depth_scale` scales.
        depth_scale: variance of the first draw of `outputs` as a multiple of the bank's own: 1 / the number of residual
            branches where the bank stands in a transformer of this package that divides by depth.
            `moekit.transformer.init_weights` sets it with `scale_outputs_`; `reset_parameters` of a bank with `outputs`
            must respect it.
        requires_whole_bank: whether forward needs all experts in one process, so that the bank must not be spread over
            several (expert parallelism refuses it).
        backend: who computes; see `moekit.use_backend`.
        shown: names of the attributes that ``print(model)`` shows; those that a bank lacks or has as None are left out.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    matrices: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ()
    outputs_first: bool = False
    requires_whole_bank: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...]] = ("num_experts", "dim", "hidden_dim", "activation", "dropout")
    num_experts: int
    dim: int
    depth_scale: float = 1.0
    backend: Backend = "auto"

    def extra_repr(self) -> str:  # noqa: D102
        found = {name: getattr(self, name, None) for name in self.shown}
        return ", ".join(f"{name}={value!r}" for name, value in found.items() if value is not None)

    @torch.no_grad()
    def scale_outputs_(self, depth_scale: float) -> None:
        """Make `depth_scale` what is given, and `outputs`, as first drawn, larger or smaller accordingly.

        Nothing happens where it is that already; on the meta device the next `reset_parameters` sees to it.
        """
        if not self.outputs:
            return
        for name in self.outputs:
            weight = getattr(self, name)
            if not weight.is_meta:
                weight.mul_((depth_scale / self.depth_scale) ** 0.5)
        self.depth_scale = depth_scale

    def times(self, rows: Tensor, name: str, counts: Tensor | None) -> Tensor:
        """Rows times their expert's matrix of that name, and what an adapter of that matrix adds.

        See `moekit.surgery.adapters`.
        """
        out = product(rows, self.inputs_first(name), counts, self.backend)
        adapter = self._adapter(name)
        return out if adapter is None else out + adapter(rows, counts)

    def matrix(self, expert: int, name: str) -> Tensor:
        """One expert's matrix of that name, its adapter included: what `reference` multiplies with."""
        weight = self.inputs_first(name)[expert]
        adapter = self._adapter(name)
        return weight if adapter is None else weight + adapter.product()[expert]

    def inputs_first(self, name: str) -> Tensor:
        """Float[E, I, O]: the matrices of that name, as they are or as a view."""
        matrices: Tensor = getattr(self, name)
        return matrices.transpose(1, 2) if self.outputs_first else matrices

    @property
    def adapters_name(self) -> str:
        """Where the adapters of `matrices` are kept; the name tells how these lie, which merging needs to know."""
        return "transposed_adapters" if self.outputs_first else "adapters"

    def _adapter(self, name: str) -> Any:
        adapters = self._modules.get(self.adapters_name)
        return adapters[name] if isinstance(adapters, nn.ModuleDict) and name in adapters else None

    @abstractmethod
    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute every row by its expert.

        Args:
            rows: Float[R, D] sorted by expert with `counts` given (packed), or Float[E, C, D] (padded).
            counts: Int64[E], rows of each expert; None for padded rows.

        Returns:
            Float of the same shape as `rows`.
        """

    @abstractmethod
    def reference(self, expert: int, x: Tensor) -> Tensor:
        """Expert number `expert` on Float[R, D] in the plainest form: the twin that `forward` is tested against."""


def is_expert_bank(module: nn.Module) -> bool:
    """Whether a module holds experts: it is an `Experts`, or its `axes` name a dimension ``expert`` of a tensor."""
    axes = getattr(module, "axes", None)
    named = axes.values() if isinstance(axes, Mapping) else ()
    return isinstance(module, Experts) or any("expert" in dims for dims in named)


def is_matrix(axes: Collection[str]) -> bool:
    """Whether a parameter of such axes holds a matrix for every expert, or for each of its layers, and no vector."""
    return len(set(axes) - {"expert", "layer"}) > 1


def copy_first_expert_(experts: Experts) -> None:
    """Make every expert an equal copy of the first, in place.

    Banks of this package start with independent experts. DeepSpeed-MoE's code starts with copies of one module: only
    routing breaks their symmetry then, which in small runs takes long. Call this after construction, and again after
    `moekit.transformer.materialize`, which draws anew. Nothing happens to parameters on the meta device.

    Source: the released code of arXiv:2201.05596.
    """
    for name, parameter in experts.named_parameters():
        axes = experts.axes.get(name, ())
        if "expert" in axes and not parameter.is_meta:
            first = parameter.detach().narrow(axes.index("expert"), 0, 1).clone()
            parameter.detach().copy_(first.expand_as(parameter))


def rows_of(bias: Tensor, rows: Tensor, counts: Tensor | None) -> Tensor:
    """Each row's bias: Float[E, F] spread to the shape of packed or padded rows."""
    if counts is None:
        return bias[:, None, :]
    return repeat_rows(bias, counts, rows.shape[0])


def product(rows: Tensor, weight: Tensor, counts: Tensor | None, backend: Backend = "auto") -> Tensor:
    """Rows times their expert's matrix, packed or padded."""
    return torch.bmm(rows, weight) if counts is None else grouped_mm(rows, weight, counts, backend)
