"""Annotated activations: which dimension of an activation is divided, by logical axis, while its shape stays whole.

An annotation never changes what a program computes. On one process it does nothing; over many it makes a DTensor of the
whole shape, and every operation from there on is divided by torch's rules of propagation. Asking for another division
is what makes ranks talk: from tokens to experts it is the all-to-all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from moekit.parallel.mesh import EXPERT, TENSOR, Meshes
from moekit.parallel.plan import AXES
from moekit.parallel.tensor_parallel import sum_gradient


class Activations(nn.Module):
    """Annotates activations inside a module's forward; `parallelize` tells it the ranks.

    The axes ``batch`` and ``expert`` stand for the ranks of an expert group, which read different tokens; ``mlp``,
    ``heads`` and ``vocab`` for tensor-parallel partners, which read the same. Tensors of the two kinds do not mix.

    Give it everything that an operation takes: what this rank alone holds enters by `part`, what all hold alike by
    `replicate` or `split`, and `local` leaves. Gradients fit `parallelize`: each rank's loss is of its own tokens, and
    the gradient of what is replicated is the mean over ranks of the group. Weights that a module names in `axes` are
    already this rank's part in forward: ``part(self.w_in, 0, "expert")``. In a module whose weights are divided among
    tensor-parallel partners by `axes`, use ``batch`` and ``expert`` only: its partners' parts are summed already.

    Args:
        axes: The mesh dimension ("expert" or "tensor") of further axes, by axis.

    Raises:
        ValueError: If an axis is mapped to another mesh dimension.

    Source: the annotations `split` and `replicate` of GShard, arXiv:2006.16668 section 3.2, and its change between
        automatic and manual partitioning (`part`, `local`). Differs: a number of parts is not given, it is that of the
        ranks; a dimension that they do not divide evenly is refused; operations follow DTensor's propagation, and the
        places where ranks talk are where an annotation changes.

    Example:
        >>> import torch
        >>> annotate = Activations()
        >>> annotate.local(annotate.split(torch.ones(4, 2), 0, "expert")).shape  # one process
        torch.Size([4, 2])
    """

    def __init__(self, axes: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._axes = {"batch": EXPERT, **AXES, **(axes or {})}
        wrong = {name: where for name, where in self._axes.items() if where not in (EXPERT, TENSOR)}
        if wrong:
            raise ValueError(f'Activations maps axes to the mesh dimensions "expert" and "tensor": got {wrong}.')
        self._meshes: Meshes | None = None

    def connect(self, meshes: Meshes | None) -> None:
        """Annotate over these ranks; None = one process."""
        self._meshes = meshes

    def __deepcopy__(self, memo: dict[int, Any]) -> Activations:
        # A copy of the module is not sharded.
        return Activations(self._axes)

    def split(self, x: Tensor, dim: int, axis: str = "expert") -> Tensor:
        """`x`, divided along `dim` among the ranks of `axis`; the shape stays whole.

        Args:
            x: A tensor that is annotated already, or a plain one that all ranks repeat.
            dim: The dimension of the whole tensor that is divided; its size must be divisible by the number of ranks.
            axis: The logical axis that the dimension is.

        Raises:
            ValueError: If the ranks do not divide the dimension, or the axis is unknown.
        """
        return self._placed(x, dim, axis)

    def replicate(self, x: Tensor, axis: str = "expert") -> Tensor:
        """`x`, whole on every rank of `axis`: annotated already, or a plain tensor that all ranks hold alike."""
        return self._placed(x, None, axis)

    def part(self, x: Tensor, dim: int, axis: str = "batch") -> Tensor:
        """The whole tensor of which this rank holds the plain part `x` along `dim`; parts are equal in shape."""
        mesh = self._mesh(axis)
        if mesh is None:
            return x
        out: Tensor = DTensor.from_local(x.contiguous(), mesh, [Shard(dim % x.ndim)], run_check=False)
        return out

    def local(self, x: Tensor) -> Tensor:
        """This rank's part of an annotated tensor as a plain one; of a replicated one, all of it.

        A sum that is not finished yet is finished first.
        """
        if not isinstance(x, DTensor):
            return x
        (place,) = x.placements
        if place.is_partial():
            x = x.redistribute(x.device_mesh, [Replicate()])
            (place,) = x.placements
        # Ranks of an expert group each have a loss of their own: what a whole tensor is worth to all is the sum.
        summed = place.is_replicate() and self._reads_different_tokens(x.device_mesh)
        # DTensors take the gradient to be contiguous, also where nothing is summed.
        return sum_gradient(x.to_local(), [x.device_mesh.get_group()] if summed else ())

    def _placed(self, x: Tensor, dim: int | None, axis: str) -> Tensor:
        mesh = self._mesh(axis)
        if mesh is None:
            return x
        if dim is not None and x.shape[dim] % mesh.size():
            raise ValueError(
                f"the ranks of {axis!r} must divide the dimension that is split: got dimension {dim} of shape "
                f"{tuple(x.shape)} and {mesh.size()} ranks. Pad it, or replicate the tensor."
            )
        if not isinstance(x, DTensor):
            scale = 1.0 / mesh.size() if self._reads_different_tokens(mesh) else 1.0
            x = DTensor.from_local(sum_gradient(x, (), gradient_scale=scale), mesh, [Replicate()], run_check=False)
        assert isinstance(x, DTensor)
        place: Placement = Replicate() if dim is None else Shard(dim % x.ndim)
        out: Tensor = x.redistribute(mesh, [place])
        return out

    def _mesh(self, axis: str) -> DeviceMesh | None:
        if axis not in self._axes:
            raise ValueError(f"axis must be one of {', '.join(self._axes)}: got {axis!r}.")
        if self._meshes is None:
            return None
        dimension = self._axes[axis]
        mesh = self._meshes.sparse[EXPERT] if dimension == EXPERT else self._meshes.dense[TENSOR]
        # Alone there is nothing to divide, and DTensors of one rank refuse views that plain tensors allow.
        return mesh if mesh.size() > 1 else None

    @staticmethod
    def _reads_different_tokens(mesh: DeviceMesh) -> bool:
        return mesh.mesh_dim_names == (EXPERT,)
