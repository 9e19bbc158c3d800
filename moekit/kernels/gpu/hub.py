"""SonicMoE, a kernel of Hugging Face's hub, as the backend "sonicmoe".

Source: arXiv:2512.14080. It is loaded through Hugging Face's package `kernels` when it is first used, which fetches it
from the hub. This adapter has not been run: it needs a GPU of Hopper or Blackwell.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.routing import Routing

_REPOSITORY = "kernels-community/sonic-moe"
_ACTIVATIONS = {"silu": "SWIGLU", "gelu": "GEGLU", "relu": "REGLU"}


def sonic_feed_forward(
    x: Tensor, routing: Routing, w_gate: Tensor, w_up: Tensor, w_out: Tensor, activation: str
) -> Tensor:
    """Float[T, D]: the weighted sum of each token's gated experts, without drops.

    Args:
        x: Float[T, D], fp16 or bf16.
        routing: choice-major.
        w_gate: Float[E, D, F].
        w_up: Float[E, D, F]. Both are copied into one for every call.
        w_out: Float[E, F, D].
        activation: the gate's.

    Raises:
        UserError: if device, type or kernel are not there.
    """
    _require(x)
    kernel = _kernel()
    assert routing.choices is not None
    shape = (routing.choices, routing.num_tokens)
    # Token by token, as the kernel wants the list; what is not kept goes to an expert that there is not.
    expert = torch.where(routing.kept, routing.expert, routing.num_experts).view(shape).t().reshape(-1)
    weight = torch.where(routing.kept, routing.weight, 0.0).view(shape).t().reshape(-1)
    token = torch.arange(routing.num_tokens, device=x.device).repeat_interleave(routing.choices)
    hidden, _ = kernel.moe_general_routing_inputs(
        x, weight.to(x.dtype), token.int(), expert.int(),
        torch.cat([w_gate, w_up], dim=2).permute(2, 1, 0), None, w_out.permute(2, 1, 0), None,
        E=routing.num_experts, activation_type=getattr(kernel.enums.ActivationType, _ACTIVATIONS[activation]),
        is_inference_mode_enabled=not torch.is_grad_enabled(), concat_layout=True, stream_id=None,
    )  # fmt: skip
    out: Tensor = hidden
    return out


def _require(x: Tensor) -> None:
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(
            f'backend="sonicmoe" computes fp16 and bf16 on GPUs of Hopper and Blackwell: got {x.dtype} on '
            f'{x.device.type}. Use bf16 there, or backend="auto".'
        )


@cache
def _kernel() -> Any:
    try:
        found = importlib.import_module("kernels").get_kernel(_REPOSITORY)
    except Exception as error:  # no package, no network, no build for this machine
        raise UserError(
            f'backend="sonicmoe" could not load {_REPOSITORY} through the package kernels: '
            f'{type(error).__name__}: {error}. Use backend="auto".'
        ) from error
    if not hasattr(found, "moe_general_routing_inputs") or not hasattr(getattr(found, "enums", None), "ActivationType"):
        raise UserError(
            f'{_REPOSITORY} as it was loaded has not the functions that backend="sonicmoe" calls. Use backend="auto".'
        )
    return found
