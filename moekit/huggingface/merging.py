"""An adopted model as a dense one, of the architecture of transformers that it equals but for its experts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts import GateUpExperts
from moekit.huggingface.adopted_layer import AdoptedLayer
from moekit.huggingface.folder import compute_buffers
from moekit.huggingface.pruning import adopted_layers
from moekit.huggingface.upcycling import UPCYCLED, Upcycling, take
from moekit.surgery.upcycling import expert_weights


@torch.no_grad()
def merge(model: Any, load: Mapping[str, Tensor] | None = None, *, scale: float = 1.0) -> Any:
    """The dense model whose feed-forwards are averages of an adopted model's experts: the way back of `upcycle`.

    Args:
        model: adopted, whole, with weights and without adapters: a Mixtral becomes a Llama, a Qwen3-MoE a Qwen3, a
            SwitchTransformers a T5.
        load: Float[E] by path of layer: weights of the average, which need not sum to 1; None = all alike.
        scale: multiplies what the averages write. SwitchTransformers multiplies its experts by the router's
            probability, and a T5 does not.

    Returns:
        A model of the dense class, which evaluates; tensors of no expert are the same objects.

    Raises:
        UserError: transformers has no dense architecture for it, or none with these settings.

    Source: averages of weights as in arXiv:2203.05482. Differs: experts that were trained apart have no common basin,
        so expect to train on.
    """
    layers = adopted_layers(model)
    name, entry = _entry(model)
    _check(model, name, entry, layers)
    dense = _blank(model, name, entry)
    modules = dict(model.named_modules())
    for path, module in dense.named_modules():
        theirs = modules.get(_path(path, entry))
        if theirs is not None and not isinstance(theirs, AdoptedLayer):
            take(module, theirs, recurse=False)
    for path, layer in layers.items():
        weights = expert_weights(path, layer.num_experts, load)
        feed_forward = dense.get_submodule(_path(path, entry, back=True))
        averages = _average(modules[path].experts, weights, scale)
        for part, tensor in zip(entry.parts, averages, strict=True):
            feed_forward.get_submodule(part).weight = nn.Parameter(tensor)
    missing = [path for path, tensor in dense.named_parameters() if tensor.is_meta]
    assert not missing, missing
    dense.tie_weights()
    dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.eval()


def _entry(model: Any) -> tuple[str, Upcycling]:
    kind = type(model).__name__
    for name, entry in UPCYCLED.items():
        if entry.target == kind:
            return name, entry
    known = ", ".join(f"{entry.target} (a {name})" for name, entry in UPCYCLED.items())
    raise UserError(f"transformers has no dense model that {kind} could become: known are {known}.")


def _check(model: Any, name: str, entry: Upcycling, layers: Mapping[str, Any]) -> None:
    config, kind = model.config, type(model).__name__
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        raise UserError(f"a {name} has no sliding window: got {kind} with sliding_window={config.sliding_window}.")
    biased = [path for path in layers if model.get_submodule(path).experts._parameters.get("b_in") is not None]
    if biased:
        raise UserError(f"a {name} has no biases in its feed-forwards: {biased[0]} has.")
    width = getattr(config, "moe_intermediate_size", None)
    stacks = sum(getattr(config, counted) for counted in entry.layers.values())
    if width is not None and len(layers) < stacks and width != config.intermediate_size:
        raise UserError(
            f"a {name} has feed-forwards of one width: got {kind} with experts of {width} and dense layers of "
            f"{config.intermediate_size}."
        )


def _blank(model: Any, name: str, entry: Upcycling) -> Any:
    """The dense model on the meta device, but for buffers that are computed."""
    import transformers

    config = model.config
    given = {field: getattr(config, field) for field in entry.same if hasattr(config, field)}
    kind: Any = getattr(transformers, name)
    with torch.device("meta"):
        dense = kind._from_config(kind.config_class(**given | entry.dense_fields(config)), dtype=model.dtype)
    compute_buffers(dense)
    return dense


def _path(path: str, entry: Upcycling, *, back: bool = False) -> str:
    """The path of a module of the dense model in the sparse one, or the other way."""
    dense, sparse = (end.rpartition(".")[2] for end in (entry.dense, entry.feed_forward))
    one, other = (sparse, dense) if back else (dense, sparse)
    return ".".join(other if part == one else part for part in path.split("."))


def _average(experts: Any, weights: Tensor, scale: float) -> list[Tensor]:
    """The linear layers of one expert that is the average: those of inputs, and that of the output."""

    def average(stacked: Tensor) -> Tensor:
        wide = torch.zeros(stacked.shape[1:], dtype=torch.float64, device=stacked.device)
        for weight, matrix in zip(weights.tolist(), stacked, strict=True):  # one at a time: double takes memory
            wide += weight * matrix.to(torch.float64)
        return wide

    if isinstance(experts, GateUpExperts):
        inner, outer = average(experts.gate_up_proj).chunk(2), average(experts.down_proj)
    else:
        inner, outer = (average(experts.w_in).t(),), average(experts.w_out).t()
    kind = next(experts.parameters()).dtype
    return [matrix.to(kind).contiguous() for matrix in (*inner, outer * scale)]
