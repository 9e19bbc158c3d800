"""Experts that are there several times: what keeps a layer's function then, by the weights that its router gives."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moekit.errors import UserError
from moekit.routing import Compensation
from moekit.surgery.sparse_layer import PLAIN_AXES, SparseLayer, State, below


def compensations(
    layers: Mapping[str, SparseLayer], copies: float, state: State | None = None
) -> dict[str, Compensation]:
    """What each layer needs in order to compute the same with `copies` of every expert as with one.

    Under a softmax over all experts two copies share one's weight. A token's one choice then has half of it, and the
    experts' outputs must be doubled; of several choices twice as many are needed, because the best two are the copies
    of the best one.

    Args:
        layers: The result of `sparse_layers`.
        copies: The number n of copies of every expert; a fraction undoes it.
        state: The tensors by name, where the answer depends on how far training is; None = that was asked before.

    Raises:
        UserError: naming the layer: its router has no such numbers or does not say, it is still in its dense phase, or
            outputs of its experts cannot be scaled.
    """
    found = {}
    for path, layer in layers.items():
        ask = getattr(layer.routing_module, "compensation", None)
        if ask is None:
            answer = Compensation(
                obstacle=f"{type(layer.routing_module).__name__} does not say what copies of experts do"
            )
        else:
            answer = ask(copies, None if state is None else below(state, layer.router_prefix))
        obstacle = answer.obstacle
        if state is not None and not bool(state.get(f"{layer.prefix}phase.done", True)) and answer.scale != 1:
            obstacle = "its dense phase is not over, in which one expert has weight 1"
        plain = all(set(axes) <= PLAIN_AXES for axes in layer.bank_axes.values())
        if obstacle is None and answer.scale != 1 and not plain:
            obstacle = f"outputs of {layer.experts} cannot be scaled by scaling its matrices"
        if obstacle is not None:
            raise UserError(
                f"nothing makes up for copies of the experts of {path or 'the layer'} ({layer.router}): {obstacle}. "
                "Leave the compensation out (compensate=False, --plain), which changes what the model computes."
            )
        found[path] = answer
    return found


def compensate(state: State, layers: Mapping[str, SparseLayer], copies: float, *, power: int = 1) -> dict[str, Tensor]:
    """The state with the outputs of experts scaled as `compensations` says for `copies` of every expert.

    The scale lies in the experts' output matrices and biases, so nothing has to be known about it when the weights are
    read, trained on or exported.

    Args: as of `compensations`, but `state` may lack tensors, which are left out, and `power` is that of the scale: 1
    for weights, -1 and -2 for Adam's first and second moments.

    Raises:
        UserError: see `compensations`.
    """
    out = dict(state)
    for path, needed in compensations(layers, copies, state if power == 1 else None).items():
        layer = layers[path]
        if power == 1:
            factors = {f"{layer.router_prefix}{name}": factor for name, factor in needed.own.items()}
        else:  # where all copies are chosen, each has one's gradients shared by as many
            factors = dict.fromkeys(layer.dims, float(needed.choices) ** power)
        for name in output_names(layer):
            factors[name] = factors.get(name, 1.0) * needed.scale**power
        for name, factor in factors.items():
            if name in out and factor != 1:
                out[name] = out[name] * factor
    return out


def output_names(layer: SparseLayer) -> list[str]:
    """The tensors of a bank that write its result: matrices from hidden units to the model's dimension, and biases."""
    return [
        name
        for name, axes in layer.bank_axes.items()
        if "embed" in axes and ("mlp" not in axes or axes.index("embed") > axes.index("mlp"))
    ]
