"""The sparse blocks of transformers' models, and how each is a router, a bank of experts and a shared branch.

Another architecture is another entry of `SPARSE_BLOCKS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

from moekit.errors import UserError
from moekit.experts import ClampedGate, Experts, GateUpExperts, HalvesGate
from moekit.huggingface.adopted_layer import AdoptedLayer, Hearing, SigmoidGate
from moekit.huggingface.expert_modules import (
    bank_of_modules,
    check_modules,
    conversions,
    nllb_router,
    stack_modules,
    switch_router,
)
from moekit.huggingface.renamed import Renamed
from moekit.routers import (
    Balance,
    BiasedLinearScorer,
    GroupLimit,
    LossFreeRouter,
    SparseMixerRouter,
    TopKRouter,
)
from moekit.routing import Router

Scores = Literal["softmax", "softmax in groups", "sigmoid in groups", "sparse mixer", "switch", "nllb"]


@dataclass(frozen=True, kw_only=True)
class SparseBlock:
    """How a block is a `MoELayer`; text names a module or an attribute of the block or its router.

    Attributes:
        router: the module that scores experts.
        scores: how scores become weights. "softmax": over all experts, of whom the best k are taken; a softmax over the
            best k alone is the same, renormalised. "softmax in groups": the choice may be limited to the best groups of
            experts. "sigmoid in groups": likewise, and chosen with a bias that weights do not have. "sparse mixer": see
            `SparseMixerRouter`. "switch" and "nllb": over all experts, of whom the best one or two are taken as far as
            they have room, see `moekit.huggingface.expert_modules`.
        renormalise: whether the weights of a token are scaled to sum to 1, or the router's flag that says so.
        bias: whether the router's scores have one.
        shared: the branch that every token takes; None = there is none.
        shared_gate: the linear map whose sigmoid weighs that branch; None = it is added.
        jitters: rates of what training multiplies the hidden states with, in order.
        clamped: whether experts are GPT-OSS's: a clamped gate, biases, and matrices that lie inputs first.
        answers_pair: whether the block gives two values.
        expert_layers: names of the two linear layers of an expert, where experts are modules; None = all experts are in
            one tensor for each layer.
        entered: what a transformer block calls first, with its own hidden states, where its parts are given no
            positions; masks of forwards that are computed again are found by these states.
        fault: what transformers computes otherwise than its own router says; None = nothing.
        coefficient: weight of the load-balancing loss where the model's configuration has no router_aux_loss_coef.
    """

    router: str = "gate"
    scores: Scores = "softmax"
    renormalise: bool | str = False
    bias: bool = False
    shared: str | None = None
    shared_gate: str | None = None
    jitters: tuple[str, ...] = ()
    clamped: bool = False
    answers_pair: bool = False
    expert_layers: tuple[str, str] | None = None
    entered: str | None = None
    fault: str | None = None
    coefficient: float = 1e-3


SPARSE_BLOCKS: Mapping[str, SparseBlock] = {
    "MixtralSparseMoeBlock": SparseBlock(renormalise=True, jitters=("jitter_noise",)),
    "OlmoeSparseMoeBlock": SparseBlock(renormalise="norm_topk_prob"),
    "Qwen2MoeSparseMoeBlock": SparseBlock(
        renormalise="norm_topk_prob", shared="shared_expert", shared_gate="shared_expert_gate"
    ),
    "Qwen3MoeSparseMoeBlock": SparseBlock(renormalise="norm_topk_prob"),
    "DeepseekV2Moe": SparseBlock(scores="softmax in groups", shared="shared_experts"),
    "DeepseekV3MoE": SparseBlock(
        scores="sigmoid in groups",
        renormalise="norm_topk_prob",
        shared="shared_experts",
        coefficient=1e-4,  # arXiv:2412.19437 section 4.2
    ),
    "GptOssMLP": SparseBlock(router="router", renormalise=True, bias=True, clamped=True, answers_pair=True),
    "GraniteMoeMoE": SparseBlock(router="router", renormalise=True),
    "PhimoeSparseMoeBlock": SparseBlock(
        router="router", scores="sparse mixer", jitters=("input_jitter_noise", "input_jitter_noise")
    ),
    "SwitchTransformersSparseMLP": SparseBlock(
        router="router",
        scores="switch",
        jitters=("router.jitter_noise",),
        expert_layers=("wi", "wo"),
        entered="layer.0",
    ),
    "NllbMoeSparseMLP": SparseBlock(
        router="router",
        scores="nllb",
        expert_layers=("fc1", "fc2"),
        entered="self_attn_layer_norm",
        fault="transformers 5.23 runs experts 0 and 1 whichever its router chose: the chosen ones run here",
    ),
}
"""By the name of their class in transformers 5."""

_ALL_CHOICES = Balance(count="all")
_BY_SEQUENCE = Balance(count="all", scope="sequence")


class CorrectionBiasRouter(Renamed, LossFreeRouter):
    """`LossFreeRouter` whose bias bears DeepSeek-V3's name in state dicts.

    Source: the released code of arXiv:2412.19437.
    """

    renamed: Mapping[str, str] = {"bias": "e_score_correction_bias"}

    @property
    def expert_dims(self) -> Mapping[str, int] | None:  # type: ignore[override]  # noqa: D102
        return {**self.scorer.expert_dims, self.renamed["bias"]: 0}


def adopted(block: nn.Module, hearing: Hearing, config: Any = None) -> AdoptedLayer:
    """The layer that computes what a block computes, whose tensors `take_tensors` moves into it.

    Args:
        block: one whose class `SPARSE_BLOCKS` has.
        hearing: what the layers of its model share.
        config: the configuration of the model.

    Raises:
        UserError: it was made by an older transformers, is quantized, has hooks that load it where it is used, or does
            something that moekit does not compute.
    """
    entry = SPARSE_BLOCKS[type(block).__name__]
    _check(block, entry)
    # The block's own tensors come last, so memory is taken and random numbers are drawn for none.
    gate: Any = None
    with torch.device("meta"):
        router, experts = _router(block, entry, config), _experts(block, entry)
        if entry.shared_gate is not None:
            gate = SigmoidGate(getattr(block, entry.shared_gate).in_features)
    names = {"router": entry.router, "shared": entry.shared, "mix": entry.shared_gate}
    layer = AdoptedLayer(
        router,
        experts,
        None if entry.shared is None else getattr(block, entry.shared),
        gate,
        renamed={ours: theirs for ours, theirs in names.items() if theirs not in (None, ours)},
        jitters=tuple(rate for name in entry.jitters if (rate := float(attrgetter(name)(block)))),
        answers_pair=entry.answers_pair,
        hearing=hearing,
    )
    _in_order(layer._modules, block._modules)
    return layer.train(block.training)


def take_tensors(layer: AdoptedLayer, block: nn.Module) -> None:
    """Give a layer of `adopted` the tensors of its block: the same objects, or stacked where experts are modules."""
    entry = SPARSE_BLOCKS[type(block).__name__]
    if entry.shared_gate is not None:
        assert layer.mix is not None
        _move(layer.mix, getattr(block, entry.shared_gate))
    router = block.get_submodule(entry.router)
    if entry.expert_layers is None:
        _move(layer.router, router)
        _move(layer.experts, block.get_submodule("experts"))
    else:
        _move(layer.router, router.get_submodule("classifier"))
        bank: Any = layer.experts
        stack_modules(bank, block.get_submodule("experts"), entry.expert_layers)


def weight_conversions(block: nn.Module, name: str) -> list[Any]:
    """How `save_pretrained` gets the tensors of the block called `name` in its parent from those of its layer."""
    entry = SPARSE_BLOCKS[type(block).__name__]
    if entry.expert_layers is None:
        return []
    first: Any = next(iter(block.get_submodule("experts").children()))
    return list(conversions(entry.expert_layers, name, getattr(first, entry.expert_layers[0]).bias is not None))


def _check(block: nn.Module, entry: SparseBlock) -> None:
    name = type(block).__name__
    experts: Any = block.experts
    tensors = dict(experts.named_parameters())
    if entry.expert_layers is not None:
        check_modules(experts, entry.expert_layers, name)
    elif not {"gate_up_proj", "down_proj"} <= tensors.keys():
        raise UserError(
            f"the experts of {name} must be one tensor gate_up_proj and one down_proj, as in transformers 5: got "
            f"{', '.join(list(tensors)[:3]) or 'no parameters'}. Install transformers>=5 and load the model again."
        )
    for path, tensor in block.named_parameters():
        if not tensor.is_floating_point():
            raise UserError(
                f"weights must be floating-point numbers: {name} has {path} of {tensor.dtype}. Load the model without "
                "quantization."
            )
    for module in block.modules():
        if hasattr(module, "_hf_hook"):
            raise UserError(
                f"{name} is loaded part by part while it computes (accelerate's device_map). Load the model without "
                "device_map."
            )
    if entry.expert_layers is not None:
        return
    router = getattr(block, entry.router)
    expected = {"weight", *(["bias"] if entry.bias else ())}
    if {path for path, _ in router.named_parameters()} != expected:
        raise UserError(
            f"the router of {name} must have {' and '.join(sorted(expected))}: got "
            f"{', '.join(path for path, _ in router.named_parameters())}."
        )


def _router(block: nn.Module, entry: SparseBlock, config: Any) -> Router:
    if entry.scores in ("switch", "nllb"):
        return (switch_router if entry.scores == "switch" else nllb_router)(block, config)
    theirs: Any = getattr(block, entry.router)
    num_experts, dim = theirs.weight.shape
    flag = entry.renormalise
    renormalise = bool(getattr(theirs, flag)) if isinstance(flag, str) else flag
    if entry.scores == "softmax":
        scorer = BiasedLinearScorer() if entry.bias else None
        plain = TopKRouter(dim, num_experts, theirs.top_k, scorer=scorer, balance=_ALL_CHOICES)
        # Set afterwards: with k = 1 the router refuses what leaves it without a gradient, as the original is.
        plain.renormalise = "before_drop" if renormalise else "none"
        return plain
    if entry.scores == "sparse mixer":
        return SparseMixerRouter(dim, num_experts, theirs.top_k, tolerance=theirs.router_jitter_noise)
    sigmoid = entry.scores == "sigmoid in groups"
    limited = (sigmoid or theirs.topk_method == "group_limited_greedy") and theirs.topk_group < theirs.num_group
    router = (CorrectionBiasRouter if sigmoid else LossFreeRouter)(
        dim,
        num_experts,
        theirs.top_k,
        update_rate=0.0,
        score="sigmoid" if sigmoid else "softmax",
        scaling_factor=theirs.routed_scaling_factor,
        groups=GroupLimit(theirs.num_group, theirs.topk_group, best=2 if sigmoid else 1) if limited else None,
        balance=_BY_SEQUENCE,
        balance_choices="unbiased" if sigmoid else "biased",
    )
    router.renormalise = renormalise
    if not sigmoid:  # there is no bias: it stays zero, and in no state dict
        router.observes = False
        router.register_buffer("bias", torch.zeros(num_experts, device=theirs.weight.device), persistent=False)
    return router


def _experts(block: nn.Module, entry: SparseBlock) -> Experts:
    theirs: Any = block.experts
    if entry.expert_layers is not None:
        return bank_of_modules(theirs, entry.expert_layers)
    num_experts, a, b = theirs.down_proj.shape
    if entry.clamped:
        return GateUpExperts(
            num_experts, b, a, gate=ClampedGate(theirs.alpha, theirs.limit), bias=True, outputs_first=False
        )
    return GateUpExperts(num_experts, a, b, gate=HalvesGate(theirs.act_fn))


def _move(ours: nn.Module, theirs: nn.Module) -> None:
    """Move parameters and buffers, which stay the same objects."""
    kept = ours._non_persistent_buffers_set
    pairs: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        (ours._parameters, theirs._parameters),
        (ours._buffers, theirs._buffers),
    )
    for mine, given in pairs:
        for name, tensor in mine.items():
            if tensor is not None and name not in kept:
                assert given[name].shape == tensor.shape, f"{name}: {tuple(given[name].shape)}, {tuple(tensor.shape)}"
                mine[name] = given[name]
        _in_order(mine, given)


def _in_order(mine: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    """In the order of the original, which optimizers and state dicts go by."""
    for name in [name for name in theirs if name in mine]:
        mine[name] = mine.pop(name)
