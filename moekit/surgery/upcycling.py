"""Upcycling: a dense model's feed-forwards become experts; and merging, the way back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts.dense_pretraining import Perturbation
from moekit.surgery.dense_form import OUTPUT, OUTPUT_BIAS, DenseForm, dense_form, shared_form
from moekit.surgery.sparse_layer import SparseLayer, State, below, require_separable, sparse_layers


def upcycle(
    state: State,
    target: nn.Module,
    *,
    perturb: Perturbation | None = None,
    scale: float = 1.0,
    seed: int = 0,
    power: int = 1,
) -> dict[str, Tensor]:
    """The weights of a sparse model from those of a dense one: every expert starts as the dense feed-forward.

    Where an expert is m times narrower than the dense feed-forward, expert e is its part e mod m (parts of the hidden
    dimension), so that m experts together, each with weight 1, are what the dense one was. Every part adds its output
    bias, so each gets 1 / m of the dense one's.

    With equal weights that sum to 1 over a token's experts the function is the dense model's (times m / k with
    parts). A softmax over all experts gives a fresh top-1 router weights near 1 / E: ``scale=E`` makes up for it.

    Args:
        state: the dense model's tensors by name. Moments of its optimizer work alike, with `scale` 1, no `perturb` and
            their `power`.
        target: the sparse model, with fresh weights: routers, and whatever else a sparse layer has beside its experts,
            start as they are there. Its sparse layers stand where the dense one has an `MLP` or `GLU`.
        perturb: changes the matrices of the copies, for example `moekit.experts.AddNoise`, so that experts can part;
            None = equal copies, which only the router tells apart.
        scale: multiplies what an expert writes (its output matrix and bias).
        seed: The seed of the perturbation.
        power: 1 for weights; -1 and -2 for Adam's first and second moments, which become those of the gradients that
            experts have under weight 1: the whole one for each part's output bias.

    Returns:
        The target's state dict; see `require_complete` for a check. Of moments: those that were carried over, and
        meaningless weights of the target, whose names are not those of `dense_names`.

    Raises:
        UserError: naming the key: a tensor is missing, left over, or of a shape that does not fit.

    Source: arXiv:2212.05055 (sparse upcycling: copies of the dense feed-forward, a fresh router); arXiv:2410.07524
        (parts of one feed-forward as fine-grained experts, scaled weights). Differs: parts are dealt to experts in
        turn, and nothing groups the router's scores.
    """
    layers = sparse_layers(target)
    require_separable(layers, "the target of upcycling")
    generator = torch.Generator().manual_seed(seed)
    out, used = {}, set()
    fresh = target.state_dict()
    for path, layer in layers.items():
        form = dense_form(target.get_submodule(f"{layer.prefix}experts"), path)
        dense = below(state, layer.prefix)
        used |= {f"{layer.prefix}{source}" for source, _ in form.tensors.values() if source in dense}
        expert = form.expert(dense)
        for name, tensor in expert.items():
            full = f"{layer.prefix}experts.{name}"
            if full not in layer.bank_axes:
                raise UserError(f"{full} is not in the sparse model, and the dense one has {tensor.shape} for it.")
            tensor = _copies(full, tensor, layer.bank_axes[full], fresh[full])
            if name == OUTPUT_BIAS and power > 0:
                parts = expert[OUTPUT].shape[0] // fresh[f"{layer.prefix}experts.{OUTPUT}"].shape[1]
                tensor = tensor / parts if parts > 1 else tensor
            if perturb is not None and tensor.ndim > 2:
                tensor = perturb(tensor, generator)
            out[full] = tensor * scale if name in (OUTPUT, OUTPUT_BIAS) and scale != 1 else tensor
    for name, tensor in state.items():
        if name in used:
            continue
        if name not in fresh or fresh[name].shape != tensor.shape:
            there = f"of shape {tuple(fresh[name].shape)}" if name in fresh else "not there"
            raise UserError(f"{name} of the dense model, of shape {tuple(tensor.shape)}, is {there} in the sparse one.")
        out[name] = tensor
    inside = tuple(layer.prefix for layer in layers.values())
    banks = {name for layer in layers.values() for name in layer.bank_axes}
    for name, tensor in fresh.items():
        if name not in out and name.startswith(inside) and name not in banks:
            out[name] = tensor
    return out


def dense_names(target: nn.Module) -> dict[str, str]:
    """Of every tensor of the experts of an upcycled model: the tensor of the dense model that it is from."""
    names: dict[str, str] = {}
    for path, layer in sparse_layers(target).items():
        prefix = layer.prefix
        form = dense_form(target.get_submodule(f"{prefix}experts"), path)
        names |= {f"{prefix}experts.{name}": f"{prefix}{source}" for name, (source, _) in form.tensors.items()}
    return names


def require_complete(state: State, target: nn.Module, what: str) -> None:
    """Raise UserError unless `state` has every tensor of `target`, of its shape, and no other.

    Args:
        state: The tensors by name.
        target: The model that is to hold them; it may be on the meta device.
        what: The beginning of the message.
    """
    wanted = target.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise UserError(f"{what}: {name} of shape {tuple(tensor.shape)} is missing.")
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{what}: {name} must have shape {tuple(tensor.shape)}: got {tuple(state[name].shape)}. The "
                "configuration is another model's."
            )
    if extra := next((name for name in state if name not in wanted), None):
        raise UserError(f"{what}: {extra} is in no part of the model. The configuration is another model's.")


def merge(
    state: State, source: nn.Module, target: nn.Module, *, load: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights of a dense model from those of a sparse one: the average expert takes the experts' place.

    Where the dense feed-forward is m times as wide as an expert, the experts are dealt into m groups in turn, the
    average of each group is a part of it, and each part writes with its group's share of the weights. With m = E this
    is exact: the dense model computes the weighted sum of all experts.

    A shared branch that is added to the experts is one more part, with weight 1: the last hidden units of the dense
    feed-forward, which must be wider than the experts' m parts by its hidden size.

    Args:
        state: the sparse model's tensors by name.
        source: the sparse model, for its structure; it may be on the meta device.
        target: the dense model, for its structure; it may be on the meta device. Where the sparse model has a sparse
            layer it has an `MLP` or `GLU`. Routers, and whether a dense phase is over, have no place in it.
        load: Float[E] by layer: weights of the average (they need not sum to 1); None = all alike.

    Raises:
        UserError: naming the key: a tensor is missing, left over, or of a shape that does not fit; a load of the wrong
            length or without a positive sum. Naming the layer: the dense feed-forward has another activation than the
            experts; its shared branch is mixed with the experts, is no feed-forward of their kind (the same matrices
            and biases, the same activation), or finds no room.

    Source: averages of weights as in arXiv:2203.05482. Differs: those are of models that were fine-tuned from one;
        experts that were trained apart have no common basin, so expect to train on.
    """
    layers = sparse_layers(source)
    require_separable(layers, "the model to merge")
    out = dict(state)
    wanted = target.state_dict()
    for path, layer in layers.items():
        prefix = layer.prefix
        form = dense_form(source.get_submodule(f"{prefix}experts"), path)
        weights = expert_weights(path, layer.num_experts, load)
        experts = below({name: state[name] for name in layer.bank_axes if name in state}, f"{prefix}experts.")
        width = _dense_width(form, prefix, wanted)
        _require_same_activation(path, source.get_submodule(f"{prefix}experts"), target.get_submodule(prefix[:-1]))
        narrow = experts[OUTPUT].shape[1]
        branch = _Shared.of(source, layer, form, state)
        routed = width - branch.width
        if routed <= 0 or routed % narrow or routed // narrow > layer.num_experts:
            beside = f", and {branch.width} wider for the shared branch" if branch.width else ""
            raise UserError(
                f"the dense feed-forward in the place of {path} must be 1 to {layer.num_experts} experts wide, each of "
                f"{narrow} hidden units{beside}: got {width}."
            )
        dense = branch.beside(form.dense(_merged(experts, layer, weights, routed // narrow)))
        for name in [name for name in out if name.startswith(prefix)]:
            if not (name in layer.bank_axes or name in branch.names or _routes(layer, name)):
                raise UserError(
                    f"{name} would be lost in the merge: the dense feed-forward in the place of its layer has nothing "
                    "like it. Leave that part out of the layer before."
                )
            del out[name]
        out |= {f"{prefix}{name}": tensor.contiguous() for name, tensor in dense.items()}
    require_complete(out, target, "the merged model")
    return out


@dataclass(frozen=True)
class _Shared:
    """What a sparse layer adds to its experts for every token, as tensors of a dense feed-forward.

    Attributes:
        tensors: The tensors by their names in the dense feed-forward; none = there is no shared branch.
        hidden: The dimension of the hidden units by the same names; None = a sum over parts, such as an output bias.
        width: The number of hidden units.
        names: The names in the sparse model's state.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Mapping[str, int | None] = field(default_factory=dict)
    width: int = 0
    names: Collection[str] = ()

    @staticmethod
    def of(model: nn.Module, layer: SparseLayer, form: DenseForm, state: State) -> _Shared:
        """The shared branch of one layer.

        Raises:
            UserError: it is not added, or is no feed-forward of the experts' kind.
        """
        module: Any = model.get_submodule(layer.path)
        shared: Any = getattr(module, "shared", None)
        if shared is None:
            return _Shared()
        if getattr(module, "mix", None) is not None:
            raise UserError(
                f"{layer.path} mixes its experts with a shared branch by shares of its own for every token "
                f"({type(module.mix).__name__}), which no dense feed-forward does: it cannot be merged. A shared "
                "branch that is added (mix=None) can."
            )
        name = next((name for name, child in module.named_children() if child is shared), "shared")
        prefix = f"{layer.prefix}{name}."
        tensors = below(state, prefix)
        alike = {source for bank, (source, _) in form.tensors.items() if f"{layer.prefix}experts.{bank}" in state}
        if shared_form(shared) is not form or set(tensors) != alike or shared.activation != module.experts.activation:
            raise UserError(
                f"the shared branch of {layer.path} must be {form.name} with the activation and the biases of the "
                f"experts, to become a part of one dense feed-forward with them: got {type(shared).__name__} with "
                f"{', '.join(tensors)}, activation {getattr(shared, 'activation', None)!r} (the experts' is "
                f"{module.experts.activation!r})."
            )
        axes = type(shared).axes
        hidden = {name: axes[name].index("mlp") if "mlp" in axes[name] else None for name in tensors}
        width = next(tensor.shape[dim] for name, tensor in tensors.items() if (dim := hidden[name]) is not None)
        return _Shared(tensors, hidden, width, {f"{prefix}{name}" for name in tensors})

    def beside(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One feed-forward that computes the sum of another one and this."""
        joined = dict(dense)
        for name, own in self.tensors.items():
            dim = self.hidden[name]
            joined[name] = dense[name] + own if dim is None else torch.cat([dense[name], own], dim)
        return joined


def _routes(layer: SparseLayer, name: str) -> bool:
    """Whether a tensor of the layer only chooses experts, or says that a dense phase is over."""
    inside = name.removeprefix(layer.prefix)
    if inside.startswith("phase.") or name in layer.scores or name in layer.ids:
        return True
    return name.startswith(layer.router_prefix) if layer.router else "." not in inside


def _copies(name: str, tensor: Tensor, axes: tuple[str, ...], wanted: Tensor) -> Tensor:
    """E copies of a dense tensor, or of its parts in turn, in the shape that the bank wants."""
    num_experts, of_one = wanted.shape[0], tuple(wanted.shape[1:])
    parts = 1
    cut = axes.index("mlp") - 1 if "mlp" in axes else None
    if cut is not None and len(of_one) == tensor.ndim and tensor.shape[cut] % max(of_one[cut], 1) == 0:
        parts = tensor.shape[cut] // of_one[cut]
    pieces = [tensor] if cut is None or parts == 0 else tensor.chunk(parts, cut)
    if tuple(pieces[0].shape) != of_one or num_experts % len(pieces):
        raise UserError(
            f"{name} holds {num_experts} experts of shape {of_one}: a dense tensor of shape {tuple(tensor.shape)} must "
            "have that shape, or be a whole number of such parts that divides the number of experts."
        )
    return torch.stack([pieces[expert % len(pieces)] for expert in range(num_experts)])


def expert_weights(path: str, num_experts: int, load: Mapping[str, Tensor] | None) -> Tensor:
    """Float64[E], what each expert of the layer at `path` counts in an average, summing to 1; without loads all alike.

    Raises:
        UserError: the layer's load is missing, of another size, negative or all 0.
    """
    if load is None:
        return torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    found = load.get(path)
    if found is None or found.shape != (num_experts,) or bool((found < 0).any()) or not float(found.sum()) > 0:
        raise UserError(
            f"merging the experts of {path} by load needs {num_experts} numbers that are not negative and not all 0: "
            f"got {None if found is None else found.tolist()}."
        )
    return found.to(torch.float64) / found.to(torch.float64).sum()


def _dense_width(form: DenseForm, prefix: str, wanted: Mapping[str, Tensor]) -> int:
    source = form.tensors[OUTPUT][0]
    if f"{prefix}{source}" not in wanted:
        raise UserError(f"the dense model must have {form.name} in the place of {prefix[:-1]}: {source} is missing.")
    return wanted[f"{prefix}{source}"].shape[1]


def _require_same_activation(path: str, bank: nn.Module, dense: nn.Module) -> None:
    """Raise UserError where the dense feed-forward computes another function of the same weights."""
    ours, theirs = getattr(bank, "activation", None), getattr(dense, "activation", None)
    if ours != theirs:
        raise UserError(
            f"the dense feed-forward in the place of {path} must have the activation of the experts, {ours!r}: got "
            f"{theirs!r}. Build the dense model with activation={ours!r}."
        )


def _merged(experts: Mapping[str, Tensor], layer: SparseLayer, weights: Tensor, parts: int) -> dict[str, Tensor]:
    """The tensors of one wide expert from groups of experts, dealt in turn."""
    groups = [torch.arange(part, len(weights), parts) for part in range(parts)]
    shares = [weights[group].sum() for group in groups]
    merged = {}
    for name, tensor in experts.items():
        axes = layer.bank_axes[f"{layer.prefix}experts.{name}"]
        wide = tensor.to(torch.float64)
        averages = []
        for group, share in zip(groups, shares, strict=True):
            inside = weights[group] / share if share > 0 else torch.full((len(group),), 1 / len(group))
            averages.append(torch.tensordot(inside.to(wide), wide[group], dims=1))
        if name == OUTPUT or "mlp" not in axes:
            averages = [share * average for share, average in zip(shares, averages, strict=True)]
        joined = torch.cat(averages, axes.index("mlp") - 1) if "mlp" in axes else torch.stack(averages).sum(0)
        merged[name] = joined.to(tensor.dtype)
    return merged
