"""Aggregation of experts: several models of one shape become one with the experts of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.surgery.compensation import compensate as scale_outputs
from moekit.surgery.sparse_layer import SparseLayer, State, expert_tensors, require_separable


def aggregate(
    states: Sequence[State],
    layers: Sequence[Mapping[str, SparseLayer]],
    *,
    shared_from: int | None = None,
    names: Sequence[str] = (),
    compensate: bool = True,
    power: int = 1,
) -> dict[str, Tensor]:
    """One state dict with the experts of all models: first those of the first, then those of the second, and so on.

    Expert weights and gate rows are put side by side. What is not an expert's is averaged (in float64 inside) or taken
    from one model; what is not a floating-point number (step counters, flags) is the first model's, or that model's.
    Tables of expert numbers take turns: the first key's entry is the first model's, the second key's the second's.

    Side by side under one softmax, experts share the weight that they had alone: with two models a top-1 weight halves.
    So experts write more, by as much as their weight shrinks (`moekit.surgery.compensations` says how much), and the
    aggregate of a model with itself computes what the model does. Where a token chooses several experts, the aggregate
    must be built with as many times more choices as there are models, k * n: the best two are copies of one.

    The average makes sense where the models have a common ancestor, or the same start: weights of models that were
    initialised apart do not lie in one basin, and their average computes nothing.

    Args:
        states: Two or more state dicts; moments of optimizers by parameter name work alike.
        layers: The result of `sparse_layers` for each model.
        shared_from: The number of the model that what is shared is taken from; None = the average of all.
        names: What messages call the models, for example their files.
        compensate: False = experts as they are, whatever their weights become: the paper's plain form.
        power: The power of the scale: 1 for weights; -1 and -2 for Adam's first and second moments, which become those
            of the gradients that the scaled experts will have.

    Raises:
        UserError: naming model and key: models that have other tensors, or other shapes where no experts are counted
            (another dimension, vocabulary or depth); a router for which no compensation exists.

    Source: arXiv:2109.10465 (aggregation of experts). Differs: its text was not at hand; the compensation, the order of
        experts, and averages as the default for what is shared, are ours.
    """
    names = list(names) or [f"model {n}" for n in range(len(states))]
    if len(states) < 2 or len(layers) != len(states) or len(names) != len(states):
        raise UserError(f"aggregation needs two or more models, each with its layers: got {len(states)}.")
    if shared_from is not None and not 0 <= shared_from < len(states):
        raise UserError(f"shared_from must be a model's number, 0..{len(states) - 1}: got {shared_from}.")
    for found, name in zip(layers, names, strict=True):
        require_separable(found, name)
    _require_alike(states, layers, names)
    if compensate:
        states = [_scaled(state, layers, number, power) for number, state in enumerate(states)]
    dims = {name: dim for name, _, dim in expert_tensors(layers[0])}
    tables = {name: layer.path for layer in layers[0].values() for name in layer.ids}
    out = {}
    for name in states[0]:
        given = [state[name] for state in states]
        if name in dims:
            out[name] = torch.cat(given, dims[name])
        elif name in tables:
            out[name] = _interleaved(given, [found[tables[name]].num_experts for found in layers])
        elif shared_from is not None:
            out[name] = given[shared_from].clone()
        elif given[0].is_floating_point():
            out[name] = torch.stack([one.to(torch.float64) for one in given]).mean(0).to(given[0].dtype)
        else:
            out[name] = given[0].clone()
    return out


def _scaled(state: State, layers: Sequence[Mapping[str, SparseLayer]], number: int, power: int) -> dict[str, Tensor]:
    """One model's state with experts that write as much as their weights will shrink among the experts of all."""
    out = dict(state)
    for path, layer in layers[number].items():
        copies = sum(found[path].num_experts for found in layers) / layer.num_experts
        out |= scale_outputs(out, {path: layer}, copies, power=power)
    return out


def _interleaved(tables: Sequence[Tensor], num_experts: Sequence[int]) -> Tensor:
    first = torch.tensor([0, *num_experts[:-1]]).cumsum(0)
    shifted = torch.stack([table.flatten() + int(start) for table, start in zip(tables, first, strict=True)])
    key = torch.arange(shifted.shape[1])
    return shifted[key % len(tables), key].view(tables[0].shape)


def _require_alike(states: Sequence[State], layers: Sequence[Mapping[str, SparseLayer]], names: Sequence[str]) -> None:
    """The same tensors everywhere, of the same shape but for the experts."""
    for state, found, name in zip(states[1:], layers[1:], names[1:], strict=True):
        if list(found) != list(layers[0]):
            raise UserError(
                f"{name} must have the sparse layers of {names[0]}: got {', '.join(found)} and {', '.join(layers[0])}."
            )
        for path, layer in found.items():
            other = layers[0][path]
            if (layer.experts, layer.router, layer.k) != (other.experts, other.router, other.k):
                raise UserError(
                    f"{name}: {path} must be of the kind that it is in {names[0]}: got {layer.router} (k={layer.k:g}) "
                    f"and {layer.experts}, there {other.router} (k={other.k:g}) and {other.experts}."
                )
        for key in (*states[0], *state):
            if key not in state or key not in states[0]:
                here, there = ("has", "lacks") if key in state else ("lacks", "has")
                raise UserError(f"{name} {here} {key}, which {names[0]} {there}: they are models of another build.")
        dims = {key: dim for key, _, dim in expert_tensors(found)}
        for key, tensor in state.items():
            shapes = [list(tensor.shape), list(states[0][key].shape)]
            if key in dims and len(shapes[0]) == len(shapes[1]):
                for shape in shapes:
                    shape[dims[key]] = 0
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{name}: {key} must have the shape that it has in {names[0]}, but for the number of experts: got "
                    f"{tuple(tensor.shape)} and {tuple(states[0][key].shape)}. Models of different dimension, depth or "
                    "vocabulary cannot be aggregated."
                )
