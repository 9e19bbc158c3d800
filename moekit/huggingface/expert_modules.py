"""The sparse blocks of SwitchTransformers and NllbMoe, whose experts are modules: routers, bank and names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.functional.activation import Activation
from moekit.functional.dropout import dropout
from moekit.routers import (
    AllChoices,
    Balance,
    BiasedLinearScorer,
    RandomChoice,
    SampledChoice,
    SecondExpertPolicy,
    SequenceCapacity,
    TopKRouter,
)
from moekit.routing import Capacity

_ACTIVATIONS: Mapping[str, Activation] = {"ReLU": "relu", "SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu"}
_POLICIES: Mapping[str, SecondExpertPolicy] = {
    "all": AllChoices(), "sampling": SampledChoice(), "random": RandomChoice(0.5),
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class TokenCapacity(Capacity):
    """An expert takes so many tokens of a training batch, and a share of an evaluated one's.

    A factor ``train`` or ``eval`` that is set later counts in the place of these.

    Attributes:
        train_slots: tokens per expert in training, whatever the batch.
        eval_share: tokens per expert in evaluation, as a share of the batch's positions; None = `train_slots`.

    Source: the released code of NllbMoe (arXiv:2207.04672).
    """

    train_slots: int = 64
    eval_share: float | None = None

    @property
    def looks_ahead(self) -> bool:
        """See `Capacity`."""
        return self.priority == "probability"

    def slots(self, num_tokens: int, num_experts: int, k: int, *, training: bool) -> int | None:
        """See `Capacity`; a share is rounded up."""
        if (self.train if training else self.eval) is not None:
            return super().slots(num_tokens, num_experts, k, training=training)
        if training or self.eval_share is None:
            return min(self.train_slots, num_tokens)
        if self.eval_share >= 1:
            return None
        return math.ceil(self.eval_share * num_tokens)


class ModuleExperts(GroupedMLP):
    """`GroupedMLP` with the activation and the dropout of its output that experts of NllbMoe have.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        activation: a name that `GroupedMLP` knows, or a module that is the activation.
        dropout: probability on the hidden activations.
        bias: whether both layers have biases.
        layer_names: what the two linear layers of an expert are called there.
        output_dropout: p: in training, entries of an expert's output are zero with it and the others divided by 1 - p;
            in evaluation all are multiplied by 1 - p.

    Source: transformers' NllbMoe. Differs: from arXiv:2207.04672 section 6.2.2, which masks an expert's output as a
        whole and scales nothing up; see `moekit.mixing.ExpertOutputMasking`.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation | nn.Module,
        dropout: float,
        bias: bool,
        layer_names: tuple[str, str],
        output_dropout: float = 0.0,
    ) -> None:
        named: Activation = "silu" if isinstance(activation, nn.Module) else activation
        super().__init__(num_experts, dim, hidden_dim, activation=named, dropout=dropout, bias=bias)
        if isinstance(activation, nn.Module):
            self._act = activation
        self.layer_names, self.output_dropout = layer_names, output_dropout

    def _act_and_drop(self, hidden: Tensor) -> Tensor:
        # The fused way knows activations by their names, which a module has none of.
        return self._drop(self._act(hidden)) if isinstance(self._act, nn.Module) else super()._act_and_drop(hidden)

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:  # noqa: D102
        out = super().forward(rows, counts)
        if not self.output_dropout:
            return out
        if self.training:
            return dropout(out, self.output_dropout, training=True)
        return out * (1 - self.output_dropout)

    def reference(self, expert: int, x: Tensor) -> Tensor:  # noqa: D102
        return super().reference(expert, x) * (1 - self.output_dropout)


def switch_router(block: Any, config: Any) -> TopKRouter:
    """The router of a SwitchTransformersSparseMLP, with tensors of its own."""
    theirs = block.router
    _check_router(theirs, type(block).__name__)
    linear = theirs.classifier
    return TopKRouter(
        linear.in_features,
        linear.out_features,
        1,
        scorer=None if linear.bias is None else BiasedLinearScorer(),
        capacity=SequenceCapacity(config.expert_capacity),
    )


def nllb_router(block: Any, config: Any) -> TopKRouter:
    """The router of a NllbMoeSparseMLP, with tensors of its own.

    Raises:
        UserError: there is one expert, the second one's policy is unknown, its weights would be of two kinds, or
            padding takes places.
    """
    theirs, name = block.router, type(block).__name__
    _check_router(theirs, name)
    linear, policy = theirs.classifier, theirs.second_expert_policy
    normalised_first = bool(theirs.normalize_router_prob_before_dropping)
    if linear.out_features < 2:
        raise UserError(f"{name} sends tokens to two experts: it has num_experts={linear.out_features}.")
    if policy not in _POLICIES:
        raise UserError(f"second_expert_policy of {name} must be one of {', '.join(_POLICIES)}: got {policy!r}.")
    if policy == "random" and normalised_first:
        raise UserError(
            f"{name} with second_expert_policy='random' and normalize_router_prob_before_dropping=True weighs the "
            "first expert by its share of two probabilities and the second by its probability of all, which moekit "
            "does not compute. Set one of them otherwise."
        )
    if theirs.router_ignore_padding_tokens:
        raise UserError(
            f"{name} has router_ignore_padding_tokens=True, by which padding takes places at experts: moekit routes no "
            "padding. Set it to False."
        )
    share = float(theirs.moe_eval_capacity_token_fraction)
    return TopKRouter(
        linear.in_features,
        linear.out_features,
        2,
        scorer=None if linear.bias is None else BiasedLinearScorer(),
        capacity=TokenCapacity(
            priority="probability" if theirs.batch_prioritized_routing else "position",
            # The router's own number is what the last evaluation left.
            train_slots=config.expert_capacity,
            eval_share=share if share > 0 else None,
        ),
        renormalise="before_drop" if normalised_first else "after_drop",
        second_expert=_POLICIES[policy],
        balance=Balance(count="all"),
        allow_future=True,
    )


def _check_router(router: Any, name: str) -> None:
    if router.dtype != torch.float32:
        raise UserError(
            f"the router of {name} must compute in float32: got router_dtype={str(router.dtype)[6:]}. Set "
            "config.router_dtype='float32' and load the model again."
        )


def _each(experts: Any) -> dict[str, Any]:
    """The experts of a ModuleDict, which may hold other modules too."""
    return {name: expert for name, expert in experts.items() if name.startswith("expert_")}


def check_modules(experts: Any, names: tuple[str, str], name: str) -> None:
    """Raise UserError unless experts are modules of two linear layers and an activation without weights."""
    for key, expert in _each(experts).items():
        if not all(type(getattr(expert, layer, None)) is nn.Linear for layer in names):
            raise UserError(
                f"the experts of {name} must have the linear layers {' and '.join(names)}: {key} has others. Adopt the "
                "model before anything wraps them."
            )
        if next(expert.act.parameters(), None) is not None:
            raise UserError(f"the experts of {name} have an activation with weights ({type(expert.act).__name__}).")


def bank_of_modules(experts: Any, names: tuple[str, str]) -> ModuleExperts:
    """A bank without tensors yet, for a ModuleDict of experts whose two linear layers have these names."""
    first: Any = next(iter(_each(experts).values()))
    w_in = getattr(first, names[0])
    kind = _ACTIVATIONS.get(type(first.act).__name__)
    return ModuleExperts(
        len(_each(experts)),
        w_in.in_features,
        w_in.out_features,
        activation=kind or first.act,
        dropout=first.dropout.p,
        bias=w_in.bias is not None,
        layer_names=names,
        output_dropout=float(getattr(experts, "moe_token_dropout", 0.0)),
    )


@torch.no_grad()
def stack_modules(bank: ModuleExperts, experts: Any, names: tuple[str, str]) -> None:
    """Give a bank the weights of experts that are modules, which lose theirs one after the other."""
    for letter, name in (("in", names[0]), ("out", names[1])):
        layers = [getattr(expert, name) for expert in _each(experts).values()]
        for kind, part in (("w", "weight"), ("b", "bias")):
            if bank._parameters.get(f"{kind}_{letter}") is None:
                continue
            tensors = [layer.get_parameter(part) for layer in layers]
            made = torch.stack([tensor.detach().t() for tensor in tensors])
            bank._parameters[f"{kind}_{letter}"] = nn.Parameter(made, requires_grad=tensors[0].requires_grad)


def conversions(names: tuple[str, str], container: str, bias: bool) -> Iterable[Any]:
    """How transformers turns their tensors into those of a bank, and back when it saves.

    Args:
        names: the two linear layers of an expert there.
        container: the name of the sparse block in its transformer block.
        bias: whether experts have biases.
    """
    from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter, WeightRenaming

    for letter, name in (("in", names[0]), ("out", names[1])):
        theirs = f"{container}.experts.expert_*.{name}"
        yield WeightConverter(
            f"{theirs}.weight",
            f"{container}.experts.w_{letter}",
            operations=[MergeModulelist(0), Transpose(1, 2)],
        )
        if bias:
            yield WeightConverter(f"{theirs}.bias", f"{container}.experts.b_{letter}", operations=[MergeModulelist(0)])
    yield WeightRenaming(f"{container}.router.classifier.weight", f"{container}.router.weight")
    yield WeightRenaming(f"{container}.router.classifier.bias", f"{container}.router.bias")
