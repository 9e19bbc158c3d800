"""From an `Architecture` to one of our models, and from a model to its architecture or the feature in the way."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.huggingface.architecture import NAMES, Architecture, Kind, SecondExpert
from moekit.huggingface.families import FAMILIES
from moekit.layer import MoELayer
from moekit.mixing import ExpertOutputMasking
from moekit.routers import (
    AllChoices,
    InputJitter,
    LinearScorer,
    RandomChoice,
    SampledChoice,
    SecondExpertPolicy,
    SequenceCapacity,
    ThresholdChoice,
    TopKRouter,
)
from moekit.transformer import (
    MLP,
    Block,
    CrossAttention,
    EncoderDecoder,
    LayerNorm,
    RelativePositions,
    RMSNorm,
    SelfAttention,
    Side,
)
from moekit.transformer.projection import FusedLinear

T = TypeVar("T")
_SECOND_EXPERTS: dict[SecondExpert, SecondExpertPolicy] = {
    "all": AllChoices(), "sampling": SampledChoice(), "random": RandomChoice(0.5),
}  # fmt: skip


def build(ours: Architecture, *, pad_id: int) -> EncoderDecoder:
    """The model of an architecture; under ``torch.device("meta")`` without memory.

    Raises:
        ValueError: if sizes do not fit each other.
    """
    family = FAMILIES[ours.kind]

    def feed_forward(layer: int, side: Side, /) -> nn.Module:
        options: Any = {"activation": ours.activation, "dropout": ours.hidden_dropout, "bias": ours.bias}
        if layer not in ours.sparse[side]:
            return MLP(ours.dim, ours.hidden_dim[side], **options)
        router = TopKRouter(
            ours.dim,
            ours.num_experts,
            family.k,
            capacity=None if ours.limit is None else SequenceCapacity(ours.limit),
            renormalise=ours.renormalise,
            second_expert=_SECOND_EXPERTS[ours.second_expert],
            exploration=InputJitter(ours.jitter) if ours.jitter else None,
        )
        masking = ExpertOutputMasking(ours.output_masking) if ours.output_masking else None
        experts = GroupedMLP(ours.num_experts, ours.dim, ours.hidden_dim[side], **options)
        return MoELayer(router, experts, output_masking=masking)

    settings: Any = {name: getattr(ours, attribute) for name, attribute in family.position_settings.items()}
    if family.positions is RelativePositions:
        settings["heads"] = ours.heads
    return EncoderDecoder(
        ours.vocab_size,
        ours.dim,
        ours.heads,
        ours.encoder_layers,
        ours.decoder_layers,
        ours.encoder_hidden_dim,
        tied=ours.tied,
        embedding_scale=ours.embedding_scale,
        pad_id=pad_id,
        feed_forward=feed_forward,
        positions=family.positions(**settings),
        norm=functools.partial(family.norm, eps=ours.norm_eps),
        dropout=ours.dropout,
        attention_dropout=ours.attention_dropout,
        attention_scale=ours.attention_scale,
        final_dropout=ours.final_dropout,
        head_dim=ours.head_dim,
        bias=ours.bias,
    )


def describe(model: nn.Module, kind: Kind | None = None) -> Architecture:
    """The architecture of a model, if transformers can run it as it evaluates here.

    What acts in training only and has no place there (capacity factors, exploration other than jitter, which second
    experts are sent, losses) is left out.

    Args:
        model: An `EncoderDecoder`.
        kind: The family; None = the one that has the model's norms.

    Raises:
        UserError: naming the feature that cannot be said.
    """
    if type(model) is not EncoderDecoder:
        raise UserError(
            f"only an EncoderDecoder can be exported, as {' or '.join(NAMES.values())}: got {type(model).__name__}, "
            "and transformers has no such sparse architecture."
        )
    norms = {type(module) for module in model.modules() if isinstance(module, LayerNorm | RMSNorm)}
    fits: Kind = "nllb-moe" if norms == {LayerNorm} else "switch_transformers"
    return _Description(model, kind or fits).architecture()


class _Description:
    """Looks at every part of a model, and remembers where."""

    def __init__(self, model: EncoderDecoder, kind: Kind) -> None:
        self.model, self.family, self.theirs = model, FAMILIES[kind], f"transformers' {NAMES[kind]}"
        self.stacks = {"encoder": model.encoder, "decoder": model.decoder}
        self.blocks: dict[str, Block] = {
            f"{side}.layers.{i}": block for side, stack in self.stacks.items() for i, block in enumerate(stack.blocks)
        }

    def refuse(self, feature: str, where: str, hint: str = "") -> UserError:
        return UserError(f"{self.theirs} has no {feature}: {where} of this model has.{hint}")

    def one(self, values: Iterable[T], what: str) -> T:
        """The value that all share."""
        found = list(dict.fromkeys(values))
        if len(found) != 1:
            raise UserError(
                f"{self.theirs} has one {what} for the whole model: this one has "
                f"{', '.join(map(str, found)) or 'none'}."
            )
        return found[0]

    def architecture(self) -> Architecture:
        for side, stack in self.stacks.items():
            if not stack.blocks:
                raise self.refuse("side without blocks", f"the {side}")
        attentions = [m for b in self.blocks.values() for m in (b.self_attention, b.cross_attention) if m is not None]
        for path, block in self.blocks.items():
            for name, module in block.named_modules():
                for child, part in module.named_children():
                    ours = isinstance(module, SelfAttention | CrossAttention | MLP)
                    if ours and type(part) not in (nn.Linear, FusedLinear):
                        raise self.refuse(type(part).__name__, f"{path}.{name}.{child}", " Merge adapters first.")
        heads = self.one((m.heads for m in attentions), "number of heads")
        head_dim = self.one((m.head_dim for m in attentions), "size of heads")
        if not self.family.says("head_dim") and heads * head_dim != self.model.dim:
            raise self.refuse(f"head_dim other than {self.model.dim} / {heads}", "attention")
        feeds = {path: self._feed_forward(path, block) for path, block in self.blocks.items()}
        layers = {path: feed for path, feed in feeds.items() if isinstance(feed, MoELayer)}
        banks: list[Any] = [feed.experts if isinstance(feed, MoELayer) else feed for feed in feeds.values()]
        biases = [m.out.bias is not None for m in attentions]
        biases += [(bank.w_in.bias if isinstance(bank, MLP) else bank.b_in) is not None for bank in banks]
        sizes = [bank.w_in.out_features if isinstance(bank, MLP) else int(bank.hidden_dim) for bank in banks]
        found: dict[str, Any] = {}
        for side, stack in self.stacks.items():
            of_side = (size for path, size in zip(feeds, sizes, strict=True) if path.startswith(side))
            found[f"{side}_hidden_dim"] = self.one(of_side, f"hidden size in the {side}")
            found[f"{side}_layers"] = len(stack.blocks)
            found[f"{side}_sparse"] = stack.routed_layers
        if not self.family.says("decoder_hidden_dim"):
            self.one(sizes, "hidden size")
        stacks = self.stacks.values()
        found |= {
            "kind": self.family.kind,
            "vocab_size": self.model.vocab_size,
            "dim": self.model.dim,
            "heads": heads,
            "head_dim": head_dim,
            "tied": self.model.output is None,
            "bias": self.one(biases, "choice of biases or none"),
            "embedding_scale": self.model.embedding.scale,
            "attention_scale": self.one((m.scale for m in attentions), "scale of attention"),
            "activation": self.one((bank.activation for bank in banks), "activation"),
            "norm_eps": self._norm_eps(),
            "dropout": self.one((m.dropout for m in (*stacks, *self.blocks.values())), "dropout"),
            "attention_dropout": self.one((m.dropout for m in attentions), "dropout of attention"),
            "hidden_dropout": self.one((bank.dropout for bank in banks), "dropout of hidden activations"),
            "final_dropout": self.one((stack.final_dropout for stack in stacks), "final dropout"),
        }
        if found["bias"] and not self.family.bias:
            raise self.refuse("biases", "attention or a feed-forward")
        return Architecture(**found, **self._positions(), **self._routing(layers))

    def _norm_eps(self) -> float:
        wanted = self.family.norm
        names = ("self_attention_norm", "cross_attention_norm", "feed_forward_norm")
        norms = [stack.norm for stack in self.stacks.values()]
        norms += [getattr(b, name) for b in self.blocks.values() for name in names if hasattr(b, name)]
        for norm in norms:
            if type(norm) is not wanted:
                raise UserError(
                    f"{self.theirs} has no norm but {wanted.__name__}: this model has {type(norm).__name__}."
                )
        return self.one((float(norm.eps) for norm in norms), "epsilon of norms")  # type: ignore[arg-type]

    def _positions(self) -> dict[str, Any]:
        wanted = self.family.positions
        for side, stack in self.stacks.items():
            if type(stack.positions) is not wanted:
                raise UserError(
                    f"{self.theirs} has {wanted.__name__}: the {side} of this model has "
                    f"{type(stack.positions).__name__}."
                )
        return {
            attribute: self.one((getattr(s.positions, name) for s in self.stacks.values()), f"{name} of positions")
            for name, attribute in self.family.position_settings.items()
        }

    def _feed_forward(self, path: str, block: Block) -> MLP | MoELayer:
        if block.extra is not None:
            raise self.refuse("second feed-forward in a layer (sparse-dense)", path)
        feed = block.feed_forward
        if type(feed) is MLP:
            return feed
        if type(feed) is not MoELayer:
            raise self.refuse(f"{type(feed).__name__} (gated and other feed-forwards)", path)
        if type(feed.experts) is not GroupedMLP:
            raise self.refuse(f"{type(feed.experts).__name__} as experts", path)
        if type(feed.router) is not TopKRouter:
            raise self.refuse(f"{type(feed.router).__name__}", path)
        if not isinstance(feed.router.scorer, LinearScorer):
            raise self.refuse(f"{type(feed.router.scorer).__name__} in a router", path)
        if feed.shared is not None:
            raise self.refuse("branch beside the experts (shared)", path)
        if feed.phase is not None and feed.phase.active:
            raise self.refuse("tied experts (dense phase)", path, " Export it after the phase.")
        return feed

    def _routing(self, layers: dict[str, MoELayer]) -> dict[str, Any]:
        """How tokens are routed in evaluation."""
        k, says = self.family.k, self.family.says
        if not layers:
            return {} if k == 1 else {"renormalise": "after_drop"}
        routers: dict[str, Any] = {path: layer.router for path, layer in layers.items()}
        for path, router in routers.items():
            if router.k != k:
                raise self.refuse(f"choice of {router.k} experts per token (it has {k})", path)
            if isinstance(router.capacity, SequenceCapacity):
                if not says("limit"):
                    raise self.refuse("capacity by sequence", path)
            elif router.capacity.eval is not None:
                factor = f"capacity factor {router.capacity.eval:g} in evaluation"
                hint = " Make it dropless in evaluation: Capacity(eval=None)."
                raise self.refuse(f"capacity relative to the batch ({factor})", path, hint)
            if k == 2 and isinstance(router.second_expert, ThresholdChoice):
                raise self.refuse("threshold for second experts in evaluation", path)
            if k == 2 and router.renormalise == "none":
                raise self.refuse("two weights that do not sum to 1 (renormalise)", path)
        masking = [0.0 if m.output_masking is None else m.output_masking.probability for m in layers.values()]
        output_masking = self.one(masking, "probability of expert output masking")
        if output_masking and not says("output_masking"):
            raise self.refuse("expert output masking", "a layer")
        explorations = [r.exploration for r in routers.values()]
        jitter = [e.epsilon if isinstance(e, InputJitter) else 0.0 for e in explorations]
        return {
            "num_experts": self.one((r.num_experts for r in routers.values()), "number of experts"),
            "limit": self.one((getattr(r.capacity, "limit", None) for r in routers.values()), "capacity"),
            "renormalise": self.one((r.renormalise for r in routers.values()), "way to renormalise"),
            "jitter": self.one(jitter, "jitter") if says("jitter") else 0.0,
            "output_masking": output_masking,
        }
