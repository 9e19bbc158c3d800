"""A `MoELayer` in the place of a sparse block of transformers: its names, its argument, its answer."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from moekit.errors import UserError
from moekit.experts import Experts
from moekit.functional.precision import float32_linear
from moekit.huggingface.renamed import Renamed
from moekit.layer import MoELayer, MoEOutput
from moekit.mixing import Mix, Mixed
from moekit.routing import Router, Routing, RoutingContext


class Forward:
    """A forward of a model.

    Attributes:
        routings: those of the layers so far, in their order; None outside of a forward, so that a recomputation by
            activation checkpointing adds nothing.
        mask: Bool[B, S'], True = a real token; None = all are.
        sequence: Int64[B, S], which sequence a token belongs to; None = each row is one.
        with_gradient: whether it began with gradients.
        in_stack: whether an encoder or decoder is at work, in a forward of the model or called by itself.
    """

    def __init__(self) -> None:
        self.routings: list[Routing] | None = None
        self.mask: Tensor | None = None
        self.sequence: Tensor | None = None
        self.with_gradient = False
        self.in_stack = False


class _OfThisThread(threading.local):
    def __init__(self) -> None:  # called in each thread
        self.forward = Forward()


class Hearing:
    """What the layers of a model share during one of its forwards, of which several threads may run one each."""

    def __init__(self) -> None:
        self._own = _OfThisThread()
        self._masks = WeakTensorKeyDictionary()

    @property
    def forward(self) -> Forward:
        """That of this thread."""
        return self._own.forward

    def context(self, hidden: Tensor, *, training: bool) -> RoutingContext:
        """What routers may know about ``hidden`` Float[B, S, D]: the last S positions of the mask are its own.

        Raises:
            UserError: training checkpoints with use_reentrant, which hides what layers return from the loss.
        """
        forward = self.forward
        if training and forward.routings is not None and forward.with_gradient and not torch.is_grad_enabled():
            raise UserError(
                "an adopted model needs activation checkpointing that keeps the gradient of routers' losses: got "
                "use_reentrant=True. Call model.gradient_checkpointing_enable({'use_reentrant': False})."
            )
        batch, length = hidden.shape[:2]
        mask = forward.mask
        if mask is not None:
            mask = mask[:, -length:] if mask.shape[0] == batch and mask.shape[1] >= length else None
        sequence = forward.sequence
        if sequence is None or tuple(sequence.shape) != (batch, length):
            sequence = torch.arange(batch, device=hidden.device)[:, None].expand(batch, length)
        return RoutingContext(mask=mask, sequence=sequence)

    def enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a part of a transformer block: note the mask of this forward, or find that of a recomputed one.

        Parts are recomputed with the very tensors that they were given, and each forward makes cosines of its
        positions. So several forwards may come before the backward.
        """
        angles = kwargs.get("position_embeddings")
        self._note(angles[0] if isinstance(angles, tuple) else angles)

    def enter_states(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`enter` by the hidden states of a transformer block, before the first part that it calls with them."""
        self._note(args[0] if args else kwargs.get("hidden_states"))

    def begin_stack(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an encoder or a decoder: its mask is that of the layers inside."""
        self.forward.mask = real_tokens(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
        self.forward.in_stack = True

    def end_stack(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After it."""
        self.forward.mask, self.forward.in_stack = None, False

    def _note(self, key: Any) -> None:
        if not isinstance(key, Tensor):
            return
        if (
            self.forward.routings is None and not self.forward.in_stack
        ):  # or the base model is called by itself, whose mask nobody knows
            self.forward.mask, self.forward.sequence = self._masks.get(key, (None, None))
        elif (self.forward.mask is not None or self.forward.sequence is not None) and torch.is_grad_enabled():
            self._masks[key] = self.forward.mask, self.forward.sequence

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hear a forward of their own."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def real_tokens(mask: Any) -> Tensor | None:
    """Bool[B, S], True = a real token; None where there is no padding, or nothing that says so for each token."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    real = mask.bool()
    return None if real.device.type == "cpu" and bool(real.all()) else real  # not asked on a device: it would wait


class SigmoidGate(Mix):
    """y = routed + sigmoid(w x) shared: the weight of Qwen2-MoE's shared expert.

    Args:
        dim: D.

    Source: the released code of Qwen1.5-MoE.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(1, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the gate's weights anew, as `torch.nn.Linear` does."""
        self.weight.uniform_(-(self.dim**-0.5), self.dim**-0.5)

    def forward(  # noqa: D102
        self, x: Tensor, routed: Tensor, shared: Tensor, context: RoutingContext | None = None
    ) -> Mixed:
        return Mixed(routed + float32_linear(x, self.weight).sigmoid().to(shared.dtype) * shared)


class AdoptedLayer(Renamed, MoELayer):
    """A `MoELayer` whose parts bear the names that a block of transformers has for them.

    So what `save_pretrained` writes has the same keys, and ``layer.router`` is the router all the same. Called, it
    takes hidden states alone and gives the tensor that the block gave; hooks on it get a `MoEOutput`, as those of any
    layer.

    Args:
        router: chooses experts.
        experts: computes them.
        shared: the branch that every token takes.
        mix: how the shared branch and the experts are joined; None = added.
        renamed: names of ``router``, ``shared`` and ``mix`` there.
        jitters: rates with which training multiplies the hidden states, one after the other, by what is uniform in
            1 - rate to 1 + rate; router and experts both see the product.
        answers_pair: whether the caller takes a second value, of which it makes no use.
        hearing: shared by the layers of a model.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None,
        mix: Mix | None,
        *,
        renamed: Mapping[str, str],
        jitters: tuple[float, ...],
        answers_pair: bool,
        hearing: Hearing,
    ) -> None:
        object.__setattr__(self, "renamed", dict(renamed))
        super().__init__(router, experts, shared=shared, mix=mix)
        self.jitters, self.answers_pair, self.hearing = jitters, answers_pair, hearing

    def __call__(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Float[B, S, D] to the same, as the block that was here; the mask that some are given is known already."""
        for rate in self.jitters if self.training else ():
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1 - rate, 1 + rate)
        output: MoEOutput = super().__call__(hidden_states, self.hearing.context(hidden_states, training=self.training))
        if self.hearing.forward.routings is not None:
            self.hearing.forward.routings.append(output.routing)
        return (output.hidden, None) if self.answers_pair else output.hidden
