"""Fine-grained experts: each expert cut into parts along its hidden dimension."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moekit.errors import UserError
from moekit.surgery.sparse_layer import PLAIN_AXES, SparseLayer, State, require_separable


def split_experts(
    state: State, layers: Mapping[str, SparseLayer], parts: int, *, divided: bool = True, power: int = 1
) -> dict[str, Tensor]:
    """Each expert of hidden size F becomes m experts of size F / m; a router of k experts then chooses k * m.

    Part j of expert e has the number ``e * m + j`` and the gate row of e, so that the k * m best are all parts of the k
    best, and the function stays what it was.

    Args:
        state: The tensors by name.
        layers: The result of `sparse_layers` for the model that the state is of.
        parts: The number m of parts of an expert.
        divided: Whether a part gets 1 / m of its expert's weight, as under a softmax over all experts or weights that
            are scaled to sum to 1: output matrices are multiplied by m then. False = it gets the whole weight (sigmoid
            scores that are not scaled, ReLU): output biases are divided by m instead.
        power: 1 for weights; -1 and -2 for Adam's first and second moments, which become those of the gradients
            that the parts will have.

    Raises:
        UserError: if experts cannot be cut: m does not divide F, they have more than one layer of hidden units, or
            the router is a table, which cannot choose several; or the router says that parts get another share of the
            weight than `divided`.

    Source: arXiv:2401.06066 (fine-grained experts). Differs: there they are trained so from the start.
    """
    require_separable(layers, "the model to split")
    if parts < 1:
        raise UserError(f"experts are split into 1 part or more: got {parts}.")
    out = dict(state)
    for path, layer in layers.items():
        if layer.ids:
            raise UserError(f"the experts of {path} cannot be split: {layer.router} names one expert for each key.")
        _require_share(path, layer, parts, divided)
        for name, axes in layer.bank_axes.items():
            if not set(axes) <= PLAIN_AXES:
                raise UserError(f"the experts of {path} cannot be split: {name} has the axes {', '.join(axes)}.")
            if name in out:
                out[name] = _cut(name, out[name], axes, parts, divided, power)
        for name, dim in layer.scores.items():
            if name in out:
                # A block of entries for each expert (Soft MoE's slots) is repeated as a whole.
                blocks = out[name].unflatten(dim, (layer.num_experts, -1))
                # A part's score has one m-th of the gradient whatever its weight: from 1 / m of the weight, or from
                # what one m-th of the expert writes.
                factor = float(parts) ** min(power, 0)
                out[name] = blocks.repeat_interleave(parts, dim).flatten(dim, dim + 1) * factor
    return out


def _require_share(path: str, layer: SparseLayer, parts: int, divided: bool) -> None:
    """Raise UserError where the router is known to give parts another share than the caller says."""
    ask = getattr(layer.routing_module, "compensation", None)
    answer = None if ask is None or not layer.scores else ask(float(parts))
    if answer is None or answer.obstacle is not None or parts == 1:
        return  # nothing is known, or nothing is cut
    found = answer.scale * answer.choices != 1  # of one part's weight, its share is 1 / (scale * choices)
    if found != divided:
        share, said = ("1 / m of the", "divided=True") if found else ("the whole", "divided=False (--whole-weights)")
        raise UserError(
            f"each part of an expert of {path} gets {share} weight under {layer.router}: split it with {said}, got "
            f"divided={divided}."
        )


def _cut(name: str, tensor: Tensor, axes: tuple[str, ...], parts: int, divided: bool, power: int) -> Tensor:
    expert = axes.index("expert")
    if "mlp" not in axes:  # an output bias, which every part adds
        factor = float(parts) ** (min(power, 0) if divided else -max(power, 0))
        return tensor.repeat_interleave(parts, expert) * factor
    hidden = axes.index("mlp")
    if tensor.shape[hidden] % parts:
        raise UserError(
            f"{name} has experts of {tensor.shape[hidden]} hidden units, which must be divisible by the number of "
            f"parts: got {parts}."
        )
    # [E, ..., F, ...] -> [E, m, ..., F / m, ...] -> [E * m, ..., F / m, ...]
    cut = tensor.unflatten(hidden, (parts, -1)).movedim(hidden, expert + 1).flatten(expert, expert + 1)
    writes = "embed" in axes and axes.index("embed") > hidden
    return cut * float(parts) ** power if writes and divided else cut.contiguous()
