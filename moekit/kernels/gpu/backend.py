"""Who computes a sparse layer: torch's own operations, the Triton kernels of this folder, or a kernel of the hub."""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from moekit.errors import UserError, nearest
from moekit.functional.eager import is_symbolic
from moekit.kernels.gpu.language import PRESENT, is_interpreted
from moekit.kernels.gpu.proof import failure
from moekit.kernels.gpu.tiles import capability

Backend = Literal["auto", "torch", "triton", "sonicmoe"]
"""A backend by name; see `use_backend`."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """Who computes something.

    Attributes:
        name: "torch" or "triton".
        reason: why not the other one; empty where it was asked for by name.
    """

    name: Literal["torch", "triton"]
    reason: str


def use_backend(model: nn.Module, backend: Backend) -> None:
    """Say who computes the sparse layers of a model: all banks and top-k routers in it.

    Args:
        model: any module; `moekit.MoELayer` takes the same word as an argument.
        backend: "auto", the default of all modules, is Triton on NVIDIA GPUs of compute capability 8.0 and later where
            it is expected to be faster (`choose`) and has computed a small layer right on this device, else torch.
            "torch" is torch's operations alone. "triton" is Triton for whatever it can compute, and an error that says
            why where the device or the type is not for it. "sonicmoe" is the hub's kernel for gated experts on Hopper
            and Blackwell, through Hugging Face's package `kernels`.

    Raises:
        UserError: if there is no backend of that name, or if what it needs is not installed.
    """
    check_backend(backend)
    for module in model.modules():
        if hasattr(type(module), "backend"):
            module.backend = backend  # type: ignore[assignment]


def check_backend(backend: str, *, on_gpu: bool = True) -> None:
    """Raise UserError where a backend does not exist, or needs a GPU or a package that is not there."""
    if backend not in get_args(Backend):
        raise UserError(f"There is no backend {backend!r}. {nearest(backend, get_args(Backend))}")
    if backend == "triton" and not PRESENT:
        raise UserError(
            'backend="triton" needs the package triton, which is not installed. It comes with torch\'s CUDA build on '
            'Linux, and by `pip install triton`; backend="auto" does without it.'
        )
    if backend in ("triton", "sonicmoe") and not on_gpu:
        raise UserError(
            f"train.backend={backend} computes on a GPU: this run trains on a CPU. Leave it out, or give "
            "--train.accelerator gpu on a machine that has one."
        )
    if backend == "sonicmoe" and importlib.util.find_spec("kernels") is None:
        raise UserError(
            'backend="sonicmoe" needs the package kernels of Hugging Face, which is not installed. Install it with '
            '`pip install kernels`, or use backend="auto".'
        )


def choose(
    backend: Backend, x: Tensor, what: Literal["layer", "product", "router"], dtype: torch.dtype | None = None
) -> Choice:
    """Who computes `what` on a tensor like `x`, in `dtype` (None = its own).

    For "auto" Triton is expected to be faster

    - for a whole layer and a router: always, since it writes no permuted rows and starts far fewer kernels;
    - for a grouped product alone: where torch has no kernel for it and multiplies expert by expert, waiting for the
      counts (all but bf16 on compute capability 9 and 10);
    - for float32: only where the program allows TF32, for Triton's exact float32 products are slow.

    These are expectations from published measurements of such kernels, not measurements of these.

    Raises:
        UserError: if `backend` is "triton" and it cannot compute `x`.
    """
    if backend in ("torch", "sonicmoe"):
        return Choice("torch", "")
    if is_symbolic() or x.device.type == "meta":
        return Choice("torch", "what is compiled, transformed or without numbers is made of torch's operations")
    if backend == "auto" and x.device.type != "cuda":  # the common case first: it is asked in every forward
        return Choice("torch", f"the tensors are on {x.device.type}")
    dtype = dtype or x.dtype
    obstacle = _obstacle(x, dtype)
    if backend == "triton":
        if obstacle:
            raise UserError(
                f'backend="triton" cannot compute this: {obstacle}. It needs float32, fp16 or bf16 on an NVIDIA GPU of '
                'compute capability 8.0 or later. Use backend="auto", which takes torch\'s operations there.'
            )
        return Choice("triton", "")
    obstacle = obstacle or _slower(x.device, dtype, what) or failure(x.device, dtype)
    return Choice("torch", obstacle) if obstacle else Choice("triton", "")


def _obstacle(x: Tensor, dtype: torch.dtype) -> str:
    """Why Triton cannot compute a tensor; empty if it can."""
    if not PRESENT:
        return "triton is not installed"
    if dtype not in _DTYPES:
        return f"it is {dtype}"
    if type(x) not in (Tensor, nn.Parameter):
        return f"the tensors are of the kind {type(x).__name__}"
    if is_interpreted():
        return "" if x.device.type == "cpu" else "Triton's interpreter is on (TRITON_INTERPRET), which is for the CPU"
    if x.device.type != "cuda":
        return f"the tensors are on {x.device.type}"
    if torch.version.hip is None and capability(x.device) < (8, 0):
        return "the GPU has compute capability {}.{}".format(*capability(x.device))
    return ""


def _slower(device: torch.device, dtype: torch.dtype, what: str) -> str:
    """Why Triton is expected to be the slower one; empty if it is not."""
    if torch.version.hip is not None:
        return "these kernels have not been compared on AMD's GPUs"
    if dtype == torch.float32 and what != "router" and torch.get_float32_matmul_precision() == "highest":
        return "float32 without TF32 is faster by torch"
    if what == "product" and is_one_kernel(device, dtype):
        return "torch's grouped product is one kernel here"
    return ""


def is_one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.nn.functional.grouped_mm` of that type is one kernel there, which needs no count on the host."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)  # as in aten's own choice
