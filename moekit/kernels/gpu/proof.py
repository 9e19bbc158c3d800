"""Whether the kernels compute a small layer right on a device, before "auto" gives them a real one.

What a compiler makes of a kernel depends on GPU, driver and release; the interpreter sees none of it. So the first
layer of a type on a device waits some seconds for this, most of which is compilation.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from moekit.kernels.gpu.feed_forward import feed_forward, feed_forward_reference
from moekit.kernels.gpu.router import topk, topk_reference
from moekit.kernels.gpu.rows import RowOrder

_TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # float32 may be TF32
_TOKENS, _EXPERTS, _DIM, _HIDDEN = 70, 5, 72, 136  # no multiple of a tile; the last expert has no row


def failure(device: torch.device, dtype: torch.dtype) -> str:
    """What the kernels do wrong there; empty if nothing. Found once, and warned of."""
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured before the kernels were tried"
    return _failure(device, dtype)


@cache
def _failure(device: torch.device, dtype: torch.dtype) -> str:
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            worst = max(_layer_error(device, dtype), _router_error(device))
        wrong = "" if worst < _TOLERANCE[dtype] else f"they are off by {worst:.1e} of the result"
    except Exception as error:  # whatever a compiler or driver raises
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(
            f"moekit's Triton kernels are not used for {dtype} on {device}: {wrong}. Layers are computed by torch's "
            'operations instead; backend="torch" says so without this trial.',
            stacklevel=2,
        )
    return wrong


def _wave(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Numbers without a draw: those of the program are its own."""
    number = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
    return (torch.sin(number * 0.7) * torch.cos(number * 0.031) * scale).to(dtype).view(shape)


def _error(found: Tensor, expected: Tensor) -> float:
    """Distance over size; infinite where a number is not finite."""
    distance = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    return float(distance.nan_to_num(nan=torch.inf))  # host read: once for a device and type


def _layer_error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of a gated layer with two choices: output and all gradients."""
    x = _wave(_TOKENS, _DIM, device=device, dtype=dtype)
    w_in, w_up = (_wave(2, _EXPERTS, _DIM, _HIDDEN, device=device, dtype=dtype, scale=_DIM**-0.5)).unbind(0)
    w_out = _wave(_EXPERTS, _HIDDEN, _DIM, device=device, dtype=dtype, scale=_HIDDEN**-0.5)
    expert = torch.arange(_TOKENS, device=device) % (_EXPERTS - 2)
    order = _order_of(torch.cat([expert, expert + 1]), _EXPERTS)
    weight = _wave(2 * _TOKENS, device=device, dtype=torch.float32).abs() + 0.1
    grad = _wave(_TOKENS, _DIM, device=device, dtype=dtype, scale=0.5)
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, w_in, w_up, w_out)]
    x, weight, w_in, w_up, w_out = inputs
    fast = feed_forward(x, weight, w_in, w_up, w_out, order, "silu")
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    x, weight, w_in, w_up, w_out = wide
    slow = feed_forward_reference(x, weight, w_in, w_up, w_out, order, torch.nn.functional.silu)
    found = [fast, *torch.autograd.grad(fast, inputs, grad)]
    expected = [slow, *torch.autograd.grad(slow, wide, grad.float())]
    if bool(found[-1][-1].any()):  # host read: once for a device and type
        return torch.inf
    return max(_error(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True))


def _order_of(expert: Tensor, experts: int) -> RowOrder:
    """The order of a list without drops, by sorting."""
    assignment = expert.argsort(stable=True)
    row = torch.empty_like(assignment).scatter(0, assignment, torch.arange(len(expert), device=expert.device))
    counts = torch.zeros(experts, dtype=torch.int64, device=expert.device).index_add(0, expert, torch.ones_like(expert))
    return RowOrder(counts, row, assignment, assignment % _TOKENS, len(expert) // _TOKENS)


def _router_error(device: torch.device) -> float:
    logits = _wave(_TOKENS, _EXPERTS, device=device, dtype=torch.float32, scale=3.0).requires_grad_()
    results = []
    for form in (topk, topk_reference):
        found = form(logits, 2)
        score = (found.weight * _wave(2, _TOKENS, device=device, dtype=torch.float32)).sum() + found.router_z
        values = [found.weight.detach(), found.mean_probs.detach(), found.entropy, found.position, found.counts]
        results.append([*values, *torch.autograd.grad(score, logits)])
    return max(_error(a, b) for a, b in zip(*results, strict=True))
