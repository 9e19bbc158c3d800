"""AdamW and Adafactor for sparse models: which parameters decay, and how fast experts learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moekit.experts import Experts
from moekit.training.adafactor import Adafactor


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, expert_lr_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of trainable parameters: decayed or not, expert or not; empty groups are left out.

    A parameter decays if it is a matrix or more and not a bias: not the scales and biases of norms and linear
    layers, nor scalars. Embeddings decay. In an expert bank the first dimension counts experts, so that there a
    bias ``[E, F]`` is a vector, and does not decay either. Anything whose name ends in "bias" is a bias.

    A parameter belongs to an expert if a module that holds it is a `moekit.experts.Experts`, or names a dimension
    ``expert`` of it in its `axes`. Routers and shared experts do neither.

    Args:
        model: parameters that do not require a gradient are left out; tied ones are taken once.
        lr: learning rate.
        weight_decay: decoupled weight decay of the decayed groups.
        expert_lr_multiplier: learning rate of expert parameters / `lr`: 1 = no effect; ``sqrt(E)`` is the intent of
            arXiv:2112.10684, whose factor on gradients does next to nothing under Adam (`scale_expert_gradients`).

    Raises:
        ValueError: if the multiplier is not positive or the model has no trainable parameter.
    """
    if not expert_lr_multiplier > 0:
        raise ValueError(f"expert_lr_multiplier must be positive (1 = no effect): got {expert_lr_multiplier}.")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter, num_experts in _with_experts(model):
        if parameter.requires_grad:
            expert = num_experts is not None
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


def scale_expert_gradients(
    model: nn.Module,
    factor: float | Callable[[int], float] = math.sqrt,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Multiply the gradients of experts by a factor: between the backward and the optimizer's step.

    An expert sees k/E of the tokens, so its gradient of the loss of all tokens is about E times smaller than a dense
    feed-forward's. arXiv:2112.10684 makes it ``sqrt(E)`` times larger: its code divides the sum over workers by
    ``sqrt(E)`` and not by E.

    A step of SGD becomes larger by the factor. A step of Adam does not change, because a constant factor cancels in
    its update ``m / sqrt(v)``, up to epsilon. What changes is the global gradient norm, and so, with clipping, the step
    of *all* parameters: experts weigh more in the norm, and the others are cut more. The authors' recipe uses Adam
    without clipping. To let experts learn faster under Adam use ``expert_lr_multiplier`` of `adamw`.

    Under a Trainer, the callback `moekit.training.callbacks.expert_gradients.ScaleExpertGradients` calls this.

    Args:
        model: experts are told from other parameters as in `parameter_groups`.
        factor: a number, or a function of the bank's number of experts E; the default is ``sqrt(E)``.
        optimizer: scale only what it steps, of several; None = all.

    Raises:
        ValueError: if the factor is not positive.

    Source: arXiv:2112.10684 section 3.2; ``sqrt_world_size`` of its recipe.
    """
    stepped = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    for _, parameter, num_experts in _with_experts(model):
        if stepped is not None and id(parameter) not in stepped:
            continue
        if num_experts is not None and parameter.grad is not None:
            by = factor(num_experts) if callable(factor) else factor
            if not by > 0:
                raise ValueError(f"scale_expert_gradients needs a positive factor: got {by}.")
            parameter.grad.mul_(by)


def _with_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """Every parameter by name, with the number of experts of the bank that it belongs to, or None."""
    experts: dict[nn.Parameter, int] = {}  # the outermost bank comes first; one may wrap another
    for module in model.modules():
        axes: Any = getattr(module, "axes", None)
        for name, parameter in module.named_parameters() if isinstance(axes, Mapping) else ():
            if isinstance(module, Experts):
                experts.setdefault(parameter, module.num_experts)
            elif "expert" in (dims := axes.get(name, ())):
                experts.setdefault(parameter, parameter.shape[dims.index("expert")])
    for name, parameter in model.named_parameters():
        yield name, parameter, experts.get(parameter)


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

    Args: as of `parameter_groups`; `betas`, the decay of the moments (0.98 as in arXiv:1706.03762), and `eps`, added to
    the root of the second moment.
    """
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, expert_lr_multiplier=expert_lr_multiplier)
    return fused_adamw(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def fused_adamw(groups: Sequence[dict[str, Any]], **options: Any) -> torch.optim.AdamW:
    """Torch's AdamW over groups of parameters, fused where torch has a fused step for all of them.

    Args:
        groups: dictionaries of parameters and their options, as torch's AdamW takes them.
        **options: its other arguments.
    """
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.AdamW(groups, fused=fused, **options)
    # Fused AdamW can unscale gradients itself, wherefore Lightning refuses to clip them under mixed precision, bf16
    # included, where nothing is scaled. Left to a GradScaler, unscaling happens before clipping, as it should.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def adafactor(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    expert_lr_multiplier: float = 1.0,
    **options: Any,
) -> Adafactor:
    """`Adafactor` over `parameter_groups`, each expert of a bank for itself.

    Args: as of `parameter_groups`, with an `lr` relative to the size of the weights unless
    ``scale_by_parameter=False``; and others of `Adafactor`.

    Source: arXiv:1804.04235.
    """
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, expert_lr_multiplier=expert_lr_multiplier)
    for group in groups:
        group["batch_dims"] = int(group["name"].startswith("expert"))
    return Adafactor(groups, lr, **options)
