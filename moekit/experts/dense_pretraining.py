"""Begin dense, go on sparse: experts that are one until a step, and differ from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree

from moekit.component import Component
from moekit.experts.base import Experts, copy_first_expert_, is_matrix
from moekit.routing import Router, Routing, RoutingContext
from moekit.stepping import StepWatch

Perturbation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class MaskWeights:
    """Set each weight to zero with a probability, drawn anew for every expert.

    Raises:
        ValueError: if `probability` is not in [0, 1).

    Source: the diversify phase of arXiv:2112.14397. Differs: probability and the absence of rescaling are ours; the
        released code has no diversify phase.
    """

    probability: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise ValueError(f"MaskWeights.probability must be in [0, 1): got {self.probability}.")

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        keep = torch.rand(weight.shape, generator=generator) >= self.probability
        return weight * keep.to(weight.device)


@dataclass(frozen=True)
class AddNoise:
    """Add normal noise of `scale` times the standard deviation of the weights, drawn anew for every expert.

    Raises:
        ValueError: if `scale` is negative.

    Source: ours.
    """

    scale: float = 0.1

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ValueError(f"AddNoise.scale must not be negative: got {self.scale}.")

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        return weight + self.scale * weight.float().std().to(weight) * noise


class DensePretraining(Component):
    """Until a step all experts of a layer are one dense feed-forward; then they part, and the router begins to act.

    Given to `moekit.MoELayer` as ``phase=``. While it is active

    - the layer computes expert 0 on every real token with weight 1, which is a dense feed-forward: one product, no
      routing, no drops, no capacity, no output masking. The router has no say: it is asked about no tokens, so that its
      gradients are exactly zero (and not missing, which would set plain and sharded training apart; weight decay acts);
    - every expert receives the whole gradient of that feed-forward, so the optimizer's state of every expert becomes
      what a dense model's would be;
    - the routing that the layer returns names experts by turns with weight 1, and losses of 0.

    When `steps` optimizer steps are done, the layer's `on_step_end` copies expert 0 to all others, perturbs the copies
    if told to, and the phase is over: experts go on from the dense weights and moments. Whether it is over is a buffer,
    so a resumed run goes on where it was, whatever the step.

    Args:
        steps: optimizer steps of the dense phase; 0 = there is none.
        perturb: changes the weights of the copies (matrices only, all experts), for example `MaskWeights` (EvoMoE's
            diversify phase) or `AddNoise`; None = equal copies, whose symmetry the router breaks.
        seed: seed of the perturbation; give every layer its own.

    Raises:
        ValueError: if `steps` is negative; in the layer, if the bank's experts are not all alike.
        RuntimeError: in forward, if the experts are spread over processes: expert parallelism must be 1 while the phase
            is active (ZeRO and tensor parallelism are no obstacle).

    Source: dense pre-training of arXiv:2110.08246; expert-diversify phase of arXiv:2112.14397.
    Differs: while tied, E equal gradients stand where a dense model has one, so a global gradient norm (clipping!)
        counts the feed-forward E times; without clipping, updates of SGD and AdamW are a dense model's.
    """

    done: Tensor

    def __init__(self, steps: int, *, perturb: Perturbation | None = None, seed: int = 0) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"DensePretraining.steps must not be negative: got {steps}.")
        self.steps, self.perturb, self.seed = steps, perturb, seed
        self.register_buffer("done", torch.tensor(steps == 0))
        # The same as the buffer: reading a number from a tensor would wait for the device in every forward.
        self._done = steps == 0
        self._step_watch, self._steps_heard = StepWatch(), 0

    @property
    def active(self) -> bool:
        """Whether the experts are still one."""
        return not self._done

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the beginning."""
        self._done = self.steps == 0
        self.done.fill_(self._done)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.done.is_meta:
            self._done = bool(self.done)

    def begin(self, experts: Experts) -> None:
        """Make the experts equal; called by the layer when it is built.

        Raises:
            ValueError: if the bank's parameters cannot be one expert's, E times.
        """
        sizes = {
            name: parameter.shape[experts.axes[name].index("expert")]
            for name, parameter in experts.named_parameters()
            if "expert" in experts.axes[name]
        }
        if experts.requires_whole_bank or set(sizes.values()) != {experts.num_experts}:
            raise ValueError(
                f"DensePretraining needs a bank of {experts.num_experts} experts that are all alike: "
                f"{type(experts).__name__} has others. Use a bank such as GroupedMLP."
            )
        if self.active:
            copy_first_expert_(experts)

    def forward(self, experts: Experts, x: Tensor) -> Tensor:
        """Compute ``x`` Float[T, D] by the one expert.

        Raises:
            RuntimeError: if the experts are spread over processes.
        """
        if self.training and not self.frozen and not torch.compiler.is_compiling():
            self._step_watch.see(self, experts.parameters(), self._steps_heard)
        tie = _Tie()
        # Innermost: hooks of sharding, which come before and after, show the weights that forward works with.
        handles = (
            experts.register_forward_pre_hook(tie.show),
            experts.register_forward_hook(tie.hide, prepend=True, always_call=True),
        )
        try:
            computed: Tensor = experts(x[None])
        finally:
            for handle in handles:
                handle.remove()
        return computed[0]

    def routing(self, router: Router, x: Tensor, context: RoutingContext | None) -> Routing:
        """The list that says what the layer computed: every real token, weight 1, experts by turns (all are one)."""
        # Asked about no tokens: the names of its losses, gradients of zero, and nothing to observe.
        empty: Routing = router(x[:0], _pytree.tree_map_only(Tensor, lambda field: field[:0], context))
        nothing = 0.0 * torch.stack([empty.weight.sum(), *empty.losses.values()]).sum()
        t, e = x.shape[0], router.num_experts
        mask = None if context is None else context.mask
        real = torch.ones(t, dtype=torch.bool, device=x.device) if mask is None else mask
        turn = real.cumsum(0) - 1
        return Routing(
            token=torch.arange(t, device=x.device),
            expert=torch.where(real, turn % e, 0),
            weight=(1.0 + nothing).expand(t),
            position=torch.where(real, turn // e, -1),
            kept=real,
            losses=dict.fromkeys(empty.losses, nothing),
            num_tokens=t,
            num_experts=e,
            # Scores that say nothing, for a router in the next layer that must be given some.
            logits=None if empty.logits is None else nothing.expand(t, e),
        )

    @torch.no_grad()
    def advance(self, experts: Experts, step: int) -> None:
        """Part the experts if `step` optimizer steps are enough; called by the layer after every step."""
        self._steps_heard += 1
        if not self.active or step < self.steps:
            return
        generator = torch.Generator().manual_seed(self.seed)
        for name, parameter in experts.named_parameters():
            axes = experts.axes[name]
            if "expert" not in axes:
                continue
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            axis = axes.index("expert")
            weight = whole.narrow(axis, 0, 1).expand_as(whole).clone()
            if self.perturb is not None and is_matrix(axes):
                weight = self.perturb(weight, generator)
            if isinstance(parameter, DTensor):
                weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(weight)
        self._done = True
        self.done.fill_(True)


class _Tie:
    """While a bank's forward runs, one expert stands under the name of each of its parameters."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, str, Any]] = []

    def show(self, experts: nn.Module, args: Any) -> None:
        bank = cast(Experts, experts)
        for path, axes in bank.axes.items():
            holder, _, name = path.rpartition(".")
            owner = experts.get_submodule(holder)
            weight = getattr(owner, name)
            if weight is None or "expert" not in axes:
                continue
            axis = axes.index("expert")
            if isinstance(weight, DTensor) or weight.shape[axis] != bank.num_experts:
                raise RuntimeError(
                    "DensePretraining needs all experts in every process while they are tied: got "
                    f"{type(weight).__name__} of shape {tuple(weight.shape)} for {bank.num_experts} experts. Use "
                    "expert_parallel_size=1, or start from a dense checkpoint."
                )
            # The value of the first; the gradient goes to all, in full. total - total is 0 without rounding.
            total = weight.sum(axis, keepdim=True)
            # Attributes of the instance are found before parameters.
            self._before.append((owner, name, owner.__dict__.get(name)))
            owner.__dict__[name] = weight.narrow(axis, 0, 1).detach() + (total - total.detach())

    def hide(self, experts: nn.Module, args: Any, output: Any) -> None:
        for owner, name, before in self._before:
            if before is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = before
        self._before.clear()
