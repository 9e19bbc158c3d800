"""A rank's piece of a tensor over a mesh, cut out of the whole and shown as the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def piece_of(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """This rank's piece, a view."""
    lengths, starts = compute_local_shape_and_global_offset(whole.shape, mesh, tuple(placements))
    for dimension, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        whole = whole.narrow(dimension, min(start, whole.shape[dimension] - length), length)
    return whole


def spread(
    piece: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], stride: Sequence[int]
) -> DTensor:
    """A piece as the whole, without a copy: `DTensor.from_local` would move it to the mesh's kind of device."""
    meta = TensorMeta(torch.Size(shape), tuple(stride), piece.dtype)
    return DTensor(piece, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)
