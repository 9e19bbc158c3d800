"""From one of our models to its `Architecture`, or to the feature that transformers has no word for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.huggingface.architecture import NAMES, Architecture, Kind
from moekit.layer import MoELayer
from moekit.routers import InputJitter, LinearScorer, SequenceCapacity, ThresholdChoice, TopKRouter
from moekit.transformer import (
    MLP,
    Block,
    CrossAttention,
    EncoderDecoder,
    LayerNorm,
    RelativePositions,
    RMSNorm,
    SelfAttention,
    SplitSinusoidalPositions,
)
from moekit.transformer.projection import FusedLinear

T = TypeVar("T")


def describe(model: nn.Module, kind: Kind | None = None) -> Architecture:
    """The architecture of a model, if transformers can run it as it evaluates here.

    What acts in training only and has no place there (capacity factors, exploration other than jitter, which second
    experts are sent, losses) is left out.

    Args:
        model: an `EncoderDecoder`.
        kind: the family; None = the one that has the model's norms.

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
    return _Reader(model, kind or fits).architecture()


class _Reader:
    """Looks at every part of a model, and remembers where."""

    def __init__(self, model: EncoderDecoder, kind: Kind) -> None:
        self.model, self.kind, self.switch = model, kind, kind == "switch_transformers"
        self.stacks = {"encoder": model.encoder, "decoder": model.decoder}
        self.blocks: dict[str, Block] = {
            f"{side}.layers.{i}": block for side, stack in self.stacks.items() for i, block in enumerate(stack.blocks)
        }

    def refuse(self, feature: str, where: str, hint: str = "") -> UserError:
        return UserError(f"transformers' {NAMES[self.kind]} has no {feature}: {where} of this model has.{hint}")

    def one(self, values: Iterable[T], what: str) -> T:
        """The value that all share."""
        found = list(dict.fromkeys(values))
        if len(found) != 1:
            raise UserError(
                f"transformers' {NAMES[self.kind]} has one {what} for the whole model: this one has "
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
                if isinstance(module, SelfAttention | CrossAttention | MLP):
                    self._require_plain(f"{path}.{name}", module)
        heads = self.one((m.heads for m in attentions), "number of heads")
        head_dim = self.one((m.head_dim for m in attentions), "size of heads")
        if not self.switch and heads * head_dim != self.model.dim:
            raise self.refuse(f"head_dim other than {self.model.dim} / {heads}", "attention")
        feeds = {path: self._feed(path, block) for path, block in self.blocks.items()}
        layers = {path: feed for path, feed in feeds.items() if isinstance(feed, MoELayer)}
        banks: list[Any] = [feed.experts if isinstance(feed, MoELayer) else feed for feed in feeds.values()]
        biases = [m.out.bias is not None for m in attentions] + [_has_bias(bank) for bank in banks]
        hidden = {
            side: self.one(
                (_hidden_dim(f) for p, f in feeds.items() if p.startswith(side)), f"hidden size in the {side}"
            )
            for side in self.stacks
        }
        if self.switch:
            self.one(hidden.values(), "hidden size")
        dropouts = [stack.dropout for stack in self.stacks.values()] + [b.dropout for b in self.blocks.values()]
        found: dict[str, Any] = {
            "kind": self.kind,
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
            "dropout": self.one(dropouts, "dropout"),
            "attention_dropout": self.one((m.dropout for m in attentions), "dropout of attention"),
            "hidden_dropout": self.one((bank.dropout for bank in banks), "dropout of hidden activations"),
            "final_dropout": self.one((s.final_dropout for s in self.stacks.values()), "final dropout"),
        }
        for side, stack in self.stacks.items():
            found[f"{side}_layers"] = len(stack.blocks)
            found[f"{side}_hidden_dim"] = hidden[side]
            found[f"{side}_sparse"] = stack.routed_layers
        if self.switch and found["bias"]:
            raise self.refuse("biases", "attention or a feed-forward")
        return Architecture(**found, **self._positions(), **self._routing(layers))

    def _require_plain(self, path: str, module: nn.Module) -> None:
        for name, part in module.named_children():
            if type(part) not in (nn.Linear, FusedLinear):
                raise self.refuse(f"{type(part).__name__}", f"{path}.{name}", " Merge adapters first.")

    def _norm_eps(self) -> float:
        wanted = RMSNorm if self.switch else LayerNorm
        norms = [stack.norm for stack in self.stacks.values()]
        norms += [getattr(b, name) for b in self.blocks.values() for name in _NORMS if hasattr(b, name)]
        for norm in norms:
            if type(norm) is not wanted:
                raise UserError(
                    f"transformers' {NAMES[self.kind]} has no norm but {wanted.__name__}: this model has "
                    f"{type(norm).__name__}."
                )
        return self.one((float(norm.eps) for norm in norms), "epsilon of norms")  # type: ignore[arg-type]

    def _positions(self) -> dict[str, Any]:
        wanted = RelativePositions if self.switch else SplitSinusoidalPositions
        kinds = {side: stack.positions for side, stack in self.stacks.items()}
        for side, positions in kinds.items():
            if type(positions) is not wanted:
                raise UserError(
                    f"transformers' {NAMES[self.kind]} has {wanted.__name__}: the {side} of this model has "
                    f"{type(positions).__name__}."
                )
        names = ("num_buckets", "max_distance") if self.switch else ("first",)
        values = {name: self.one((getattr(p, name) for p in kinds.values()), f"{name} of positions") for name in names}
        return {"first_position" if name == "first" else name: value for name, value in values.items()}

    def _feed(self, path: str, block: Block) -> MLP | MoELayer:
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
        if not layers:
            return {} if self.switch else {"renormalise": "after_drop"}
        routers: dict[str, Any] = {path: layer.router for path, layer in layers.items()}
        k = 1 if self.switch else 2
        for path, router in routers.items():
            if router.k != k:
                raise self.refuse(f"choice of {router.k} experts per token (it has {k})", path)
            capacity = router.capacity
            if isinstance(capacity, SequenceCapacity):
                if not self.switch:
                    raise self.refuse("capacity by sequence", path)
            elif capacity.eval is not None:
                raise self.refuse(
                    f"capacity relative to the batch (capacity factor {capacity.eval:g} in evaluation)", path,
                    " Make it dropless in evaluation: Capacity(eval=None).",
                )  # fmt: skip
            if k == 2 and isinstance(router.second_expert, ThresholdChoice):
                raise self.refuse("threshold for second experts in evaluation", path)
            if k == 2 and router.renormalise == "none":
                raise self.refuse("two weights that do not sum to 1 (renormalise)", path)
        masking = [0.0 if m.output_masking is None else m.output_masking.probability for m in layers.values()]
        output_masking = self.one(masking, "probability of expert output masking")
        if self.switch and output_masking:
            raise self.refuse("expert output masking", "a layer")
        explorations = [r.exploration for r in routers.values()]
        jitter = [e.epsilon if isinstance(e, InputJitter) else 0.0 for e in explorations]
        return {
            "num_experts": self.one((r.num_experts for r in routers.values()), "number of experts"),
            "limit": self.one((getattr(r.capacity, "limit", None) for r in routers.values()), "capacity"),
            "renormalise": self.one((r.renormalise for r in routers.values()), "way to renormalise"),
            "jitter": self.one(jitter, "jitter") if self.switch else 0.0,
            "output_masking": output_masking,
        }


_NORMS = ("self_attention_norm", "cross_attention_norm", "feed_forward_norm")


def _has_bias(bank: MLP | GroupedMLP) -> bool:
    return bank.w_in.bias is not None if isinstance(bank, MLP) else bank.b_in is not None


def _hidden_dim(feed: MLP | MoELayer) -> int:
    return feed.w_in.out_features if isinstance(feed, MLP) else int(feed.experts.hidden_dim)  # type: ignore[arg-type]
