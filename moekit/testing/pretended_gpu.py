"""A GPU that is not there: tensors that say ``cuda:0`` and compute on the CPU, so that device faults show anywhere.

    with pretended_gpu() as gpu:
        layer.to("cuda")
        with gpu.watch() as waits:
            layer(torch.randn(5, 16, device="cuda")).hidden.sum().backward()
    assert not waits, waits

Inside, whatever meets a tensor of the CPU raises `DeviceMixError`, as on a GPU; every place where a host would wait
for a GPU is written down by file and line (`Wait`); and `torch.nn.functional.grouped_mm` is held against torch's own
checks of what the CUDA kernel takes. Results are those of the CPU, so that both can be compared.

What it cannot see: speed, memory, races, kernels. The meta device cannot be used inside.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from moekit.testing.autocast_cuda import AutocastCUDA
from moekit.testing.grouped_kernel import grouped_mm_as_kernel

_CUDA, _CPU = torch.device("cuda:0"), torch.device("cpu")


def _aten(names: str) -> set[str]:
    return {f"aten.{name}" for name in names.split()}


# Operators whose CUDA form reads from the device: sizes of results, or a check of values.
_READING = _aten(
    "_local_scalar_dense nonzero masked_select equal is_nonzero unique_dim _unique _unique2 unique_consecutive"
    " bincount multinomial"
)
_INDEXING = _aten("index index_put index_put_ _index_put_impl_ _unsafe_index")
# Operators that refuse even a scalar of the CPU beside tensors of a GPU.
_STRICT = _aten("index_add index_add_ scatter scatter_ gather index_select stack cat embedding")


class DeviceMixError(RuntimeError):
    """Tensors of the GPU and of the CPU met in one operator."""


class Wait(NamedTuple):
    """A place where the host waits for the device.

    Attributes:
        file: below the package, for example ``dispatch/packed.py``.
        line: its number there.
        what: the operator, or the direction of a copy.
    """

    file: str
    line: int
    what: str

    @property
    def source(self) -> str:
        """The line's text."""
        return linecache.getline(str(_PACKAGE + self.file), self.line).strip()

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.what}): {self.source}"


class PretendedGPU:
    """What a test sees of the device; made by `pretended_gpu`."""

    def __init__(self) -> None:
        self._waits: list[Counter[Wait]] = []

    @contextlib.contextmanager
    def watch(self) -> Iterator[Counter[Wait]]:
        """Count the places at which the host waits, meanwhile."""
        waits: Counter[Wait] = Counter()
        self._waits.append(waits)
        try:
            yield waits
        finally:
            self._waits.pop()

    def waited(self, what: str) -> None:
        """Write a wait down, at the innermost line of the package (else of Lightning or torchmetrics)."""
        if self._waits:
            place = Wait(*_place(), what)
            for waits in self._waits:
                waits[place] += 1


_PACKAGE = __file__.rpartition("testing")[0]
_CURRENT: list[PretendedGPU] = []


def _place() -> tuple[str, int]:
    other = ("?", 0)
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and "/testing/" not in name:
            return name.removeprefix(_PACKAGE), line
        if other == ("?", 0) and ("/lightning/" in name or "/torchmetrics/" in name):
            other = (name.rpartition("site-packages/")[2], line)
    return other


class _OnGPU(torch.Tensor):
    """Says ``cuda:0``; `raw` holds the numbers.

    To autograd it is a meta tensor, for its engine wants a thread for every other device, of which a build without CUDA
    has none.
    """

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, raw: Tensor) -> _OnGPU:
        with _disable_current_modes(), torch.inference_mode(False):
            made: _OnGPU = torch.Tensor._make_wrapper_subclass(
                cls,
                raw.shape,
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                device=torch.device("meta"),
            )
        made.raw = raw
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _CUDA

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"on cuda:0: {self.raw!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = _OnGPU(self.raw.clone())
        result = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        memo[id(self)] = result
        return result

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def tolist(self) -> Any:
        _now().waited("tolist")
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`: torch's own asks the driver for the number of a device without one."""
    first = args[0] if args else kwargs.get("other")
    if isinstance(first, Tensor):
        device, dtype, non_blocking = first.device, first.dtype, kwargs.get("non_blocking", False)
    else:
        parsed = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **parsed)
    here = isinstance(self, _OnGPU)
    there = here if device is None else _is_gpu(device)
    if not here and not there:
        return _TO(self, *args, **kwargs)
    if here and there and not kwargs.get("copy", False) and dtype in (None, self.dtype):
        return self
    copy: Tensor = torch.ops.aten._to_copy(
        self, dtype=dtype, device=_CUDA if there else device, non_blocking=non_blocking
    )
    return copy


def _cuda(self: Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> Tensor:
    return _to(self, _CUDA, non_blocking=non_blocking)


_TO = torch.Tensor.to


class _Mode(TorchDispatchMode):
    """Sees what has no tensor of the GPU among its arguments: new tensors, copies to the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _now() -> PretendedGPU:
    if not _CURRENT:
        raise RuntimeError("A tensor of the pretended GPU is used after the end of pretended_gpu().")
    return _CURRENT[-1]


def _is_gpu(device: Any) -> bool:
    # What C++ makes beside a tensor of ours is asked for on the meta device.
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gpu = _now()
    name = func._schema.name.replace("::", ".")
    leaves, spec = tree_flatten((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, _OnGPU)]
    if name == "aten._to_copy":
        return _copied(gpu, func, args[0], kwargs)
    if name == "aten.copy_":
        return _written(gpu, args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2]))
    device = kwargs.get("device")
    if not ours and not _is_gpu(device):
        pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if pinned:
            result._pinned = True
        return result
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with _Mode():  # whole in inference mode; elsewhere its parts arrive by themselves
            return func.decompose(*args, **kwargs)
    if name.startswith("moekit.") and ours:
        with _Mode():  # the operator's own code is seen line by line
            return OPDEFS[name.replace(".", "::")]._init_fn(*args, **kwargs)
    _check_devices(gpu, name, args, leaves, bool(ours))
    if name in _READING or (name == "aten.repeat_interleave" and kwargs.get("output_size") is None):
        gpu.waited(name)
    raw_args, raw_kwargs = tree_unflatten([_plain(leaf) for leaf in leaves], spec)
    if "pin_memory" in raw_kwargs:
        raw_kwargs["pin_memory"] = False
    with _disable_current_modes():
        result = (grouped_mm_as_kernel if name == "aten._grouped_mm" else func)(*raw_args, **raw_kwargs)
    same = {id(leaf.raw): leaf for leaf in ours}
    on_gpu = bool(ours) if device is None else _is_gpu(device)

    def returned(tensor: Tensor) -> Tensor:
        """What was written in place is the tensor that was given."""
        return same[id(tensor)] if id(tensor) in same else _OnGPU(tensor) if on_gpu else tensor

    return tree_map_only(Tensor, returned, result)


def _plain(leaf: Any) -> Any:
    """What the CPU's operator is given."""
    if isinstance(leaf, torch.device):
        return _CPU
    return leaf.raw if isinstance(leaf, _OnGPU) else leaf


def _check_devices(gpu: PretendedGPU, name: str, args: tuple[Any, ...], leaves: Sequence[Any], ours: bool) -> None:
    """Refuse what CUDA refuses, and note indexing that waits."""
    strangers = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, _OnGPU)]
    indexing = name in _INDEXING
    if ours and strangers:
        shapes = [tuple(stranger.shape) for stranger in strangers]
        if indexing and isinstance(args[0], _OnGPU):
            gpu.waited(f"{name} with an index on the CPU")
        elif any(shapes) or name in _STRICT:
            file, line = _place()
            raise DeviceMixError(f"{name}: tensors on cuda:0, and on the CPU of shapes {shapes}, at {file}:{line}.")
    if indexing and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        gpu.waited(f"{name} by a mask")


def _copied(gpu: PretendedGPU, func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A tensor in another type or on another device."""
    device = kwargs.pop("device", None)
    to_gpu = isinstance(source, _OnGPU) if device is None else _is_gpu(device)
    _note_copy(gpu, isinstance(source, _OnGPU), to_gpu, source, kwargs.get("non_blocking", False))
    kwargs.pop("pin_memory", None)
    with _disable_current_modes():
        result = func(_plain(source), **kwargs)
    return _OnGPU(result) if to_gpu else result


def _written(gpu: PretendedGPU, target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    from_gpu, to_gpu = isinstance(source, _OnGPU), isinstance(target, _OnGPU)
    _note_copy(gpu, from_gpu, to_gpu, target if from_gpu else source, non_blocking)
    with _disable_current_modes():
        _plain(target).copy_(_plain(source))
    return target


def _note_copy(gpu: PretendedGPU, from_gpu: bool, to_gpu: bool, host: Tensor, non_blocking: bool) -> None:
    """Only a copy from or to pinned memory, that is told not to, does not wait."""
    if from_gpu != to_gpu and not (non_blocking and getattr(host, "_pinned", False)):
        gpu.waited("copy to the device" if to_gpu else "copy to the host")


@contextlib.contextmanager
def pretended_gpu(*, capability: tuple[int, int] = (9, 0)) -> Iterator[PretendedGPU]:
    """A GPU ``cuda:0`` inside of the block.

    Args:
        capability: of the device: (9, 0) has torch's fast grouped product of bf16, (8, 0) has not.

    Tensors and modules come to it as to a real one: ``.to("cuda")``, ``device="cuda"``.
    """
    gpu = PretendedGPU()

    def synchronize(*_: Any) -> None:
        """Of the device and of its only stream, on which copies and kernels follow each other."""
        gpu.waited("synchronize")

    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "current_stream", lambda *_: SimpleNamespace(synchronize=synchronize)),
            (torch.cuda, "synchronize", synchronize),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "get_device_capability", lambda *_: capability),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch, "tensor", _making(torch.tensor)),
            (torch, "as_tensor", _making(torch.as_tensor)),
            (torch, "Generator", lambda device="cpu": _GENERATOR(_CPU if _is_gpu(device) else device)),
            (torch.Tensor, "to", _to),
            (torch.Tensor, "cuda", _cuda),
            (torch.Tensor, "pin_memory", _pinned),
            (torch.Tensor, "is_pinned", lambda self, *_: getattr(self, "_pinned", False)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        _CURRENT.append(gpu)
        stack.callback(_CURRENT.remove, gpu)
        stack.enter_context(_Mode())
        stack.enter_context(AutocastCUDA())
        yield gpu


_GENERATOR = torch.Generator


def _making(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` and `torch.as_tensor`: numbers of the host come to the device by a copy."""

    def make(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not _is_gpu(kwargs.get("device")):
            return original(data, *args, **kwargs)
        del kwargs["device"]
        if isinstance(data, _OnGPU):
            return data.to(kwargs.get("dtype") or data.dtype)
        return original(data, *args, **kwargs).to(_CUDA)

    return make


def _pinned(self: Tensor, *_: Any) -> Tensor:
    copy = self.detach().clone()
    copy._pinned = True  # type: ignore[attr-defined]
    return copy
