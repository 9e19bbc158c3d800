"""AdamW for sparse models: which parameters decay, and how fast experts learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, expert_lr_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of trainable parameters: decayed or not, expert or not; empty groups are left out.

    A parameter decays if it is a matrix or more and not a bias: not the scales and biases of norms and linear
    layers, nor scalars. Embeddings decay. In an expert bank the first dimension counts experts, so that there a
    bias ``[E, F]`` is a vector, and does not decay either. Anything whose name ends in "bias" is a bias.

    A parameter belongs to an expert if a module that holds it has ``is_expert_bank = True``, or if the parameter
    bears ``moekit_axes`` with "expert" in it. Routers and shared experts are not expert banks.

    Args:
        model: parameters that do not require a gradient are left out; tied ones are taken once.
        lr: learning rate.
        weight_decay: of the decayed groups.
        expert_lr_multiplier: learning rate of expert parameters / `lr`. An expert sees k/E of the tokens, and
            arXiv:2112.10684 scales its gradient by ``1 / sqrt(E)`` instead of the mean over all workers' ``1 / E``,
            that is a step ``sqrt(E)`` times larger. Under Adam such a factor on the *gradient* does nothing: the
            update is ``m / sqrt(v)``, in which a constant cancels (up to epsilon and clipping). So moekit has no
            gradient factor; this multiplies the *learning rate*, which does act. Ours: 1 (no effect); ``sqrt(E)``
            is the paper's intent.

    Raises:
        ValueError: if the multiplier is not positive or the model has no trainable parameter.
    """
    if not expert_lr_multiplier > 0:
        raise ValueError(f"expert_lr_multiplier must be positive (1 = no effect): got {expert_lr_multiplier}.")
    banks = [name + "." if name else "" for name, m in model.named_modules() if getattr(m, "is_expert_bank", False)]
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_bank = any(name.startswith(bank) for bank in banks)
            expert = in_bank or "expert" in (getattr(parameter, "moekit_axes", None) or ())
            decays = parameter.ndim - expert >= 2 and not name.endswith("bias")
            groups.setdefault((expert, decays), []).append(parameter)
    if not groups:
        raise ValueError("The model must have parameters that require a gradient: got none.")
    return [
        {
            "params": parameters,
            "lr": lr * (expert_lr_multiplier if expert else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
            "name": ("expert" if expert else "shared") + ("" if decays else "_no_decay"),
        }
        for (expert, decays), parameters in sorted(groups.items())
    ]


def adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    expert_lr_multiplier: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused where torch has a fused step.

    On one CPU core the fused step is ten times faster than the default loop over parameters (4 against 40 ms for a
    small model with two million parameters).

    Args:
        model: see `parameter_groups`.
        lr: learning rate.
        betas: decay of the moments; 0.98 as in arXiv:1706.03762.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        expert_lr_multiplier: see `parameter_groups`.
    """
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, expert_lr_multiplier=expert_lr_multiplier)
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
    # Fused AdamW can unscale gradients itself, wherefore Lightning refuses to clip them under mixed precision, bf16
    # included, where nothing is scaled. Left to a GradScaler, unscaling happens before clipping, as it should.
    optimizer._step_supports_amp_scaling = False
    return optimizer
