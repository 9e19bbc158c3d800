"""`upcycle`: a dense model of transformers becomes a sparse one, of the architecture that transformers has for it.

model = upcycle(AutoModelForCausalLM.from_pretrained(folder), num_experts=8, k=2)
model.save_pretrained("sparse")   # a Mixtral, from a Llama

Another architecture is another entry of `UPCYCLED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts.dense_pretraining import Perturbation
from moekit.functional.init import truncated_normal_
from moekit.huggingface.adopt import adopt
from moekit.layer import AuxLosses

_EVERY_TOKEN = 2**31 - 1  # an expert_capacity that no sequence reaches
_ROUTER_SCALE = 0.1  # arXiv:2101.03961 table 3


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense architecture becomes a sparse one.

    Attributes:
        target: the class of the sparse model in transformers.
        config: the class of its configuration.
        same: fields of the configuration that stay.
        required: fields of the dense configuration that must have a value, or one of several.
        fields: further fields, from the dense configuration, E, k and every.
        dense_fields: fields of the dense configuration that are none of `same`, from the sparse one: the way back.
        layers: paths of the stacks of blocks, each with the field that counts them.
        sparse: whether a layer is sparse there, from its number and every.
        feed_forward: path of a block's feed-forward there, with ``{n}`` the last part of the block.
        dense: what that path is in the dense model.
        parts: tensors of the dense feed-forward, which those of an expert are made of.
        weights_sum_to_one: whether the weights of a token's experts do, so that nothing changes at first.
        k: the number of experts per token that it can have; None = any.
        dense_layers: whether some layers may stay dense.
    """

    target: str
    config: str
    same: Sequence[str]
    required: Mapping[str, Any]
    fields: Callable[[Any, int, int, int], dict[str, Any]]
    dense_fields: Callable[[Any], dict[str, Any]]
    layers: Mapping[str, str]
    sparse: Callable[[int, int], bool]
    dense: str
    feed_forward: str
    parts: Sequence[str]
    weights_sum_to_one: bool = True
    k: int | None = None
    dense_layers: bool = True


_DECODER = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout", "rope_parameters",
)  # fmt: skip
_T5 = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "dense_act_fn",
    "relative_attention_num_buckets", "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon",
    "initializer_factor", "use_cache", "pad_token_id", "eos_token_id", "decoder_start_token_id", "tie_word_embeddings",
)  # fmt: skip

UPCYCLED: Mapping[str, Upcycling] = {
    "LlamaForCausalLM": Upcycling(
        target="MixtralForCausalLM",
        config="MixtralConfig",
        same=_DECODER,
        required={"attention_bias": False, "mlp_bias": False, "pretraining_tp": (1, None)},
        fields=lambda dense, num_experts, k, every: {
            "num_local_experts": num_experts, "num_experts_per_tok": k, "sliding_window": None,
        },
        dense_fields=lambda sparse: {"attention_bias": False, "mlp_bias": False},
        layers={"model.layers": "num_hidden_layers"},
        sparse=lambda layer, every: True,
        dense="mlp",
        feed_forward="mlp",
        parts=("gate_proj", "up_proj", "down_proj"),
        dense_layers=False,
    ),
    "Qwen3ForCausalLM": Upcycling(
        target="Qwen3MoeForCausalLM",
        config="Qwen3MoeConfig",
        same=(*_DECODER, "attention_bias"),
        required={"use_sliding_window": False},
        fields=lambda dense, num_experts, k, every: {
            "num_experts": num_experts, "num_experts_per_tok": k, "decoder_sparse_step": every,
            "moe_intermediate_size": dense.intermediate_size, "norm_topk_prob": True,
        },
        dense_fields=lambda sparse: {
            "intermediate_size": sparse.moe_intermediate_size, "use_sliding_window": False,
        },
        layers={"model.layers": "num_hidden_layers"},
        sparse=lambda layer, every: (layer + 1) % every == 0,
        dense="mlp",
        feed_forward="mlp",
        parts=("gate_proj", "up_proj", "down_proj"),
    ),
    "T5ForConditionalGeneration": Upcycling(
        target="SwitchTransformersForConditionalGeneration",
        config="SwitchTransformersConfig",
        same=_T5,
        required={"is_gated_act": False, "scale_decoder_outputs": True},
        fields=lambda dense, num_experts, k, every: {
            "num_experts": num_experts, "expert_capacity": _EVERY_TOKEN, "router_jitter_noise": 0.0,
            "encoder_sparse_step": every, "decoder_sparse_step": every,
        },
        dense_fields=lambda sparse: {"feed_forward_proj": sparse.dense_act_fn},
        layers={"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"},
        sparse=lambda layer, every: every == 1 or layer % every == 1,
        dense="layer.{n}.DenseReluDense",
        feed_forward="layer.{n}.mlp",
        parts=("wi", "wo"),
        weights_sum_to_one=False,
        k=1,
    ),
}  # fmt: skip
"""By the name of the dense class in transformers 5."""


def upcycle(
    model: Any,
    num_experts: int = 8,
    k: int | None = None,
    *,
    every: int = 1,
    perturb: Perturbation | None = None,
    scale: float = 1.0,
    seed: int = 0,
    aux: AuxLosses | Literal["default"] | None = "default",
) -> Any:
    """A sparse model from a dense one of transformers: every expert starts as the dense feed-forward.

    Where a token's weights sum to 1 (Mixtral, Qwen3-MoE) the logits are the dense model's at first. SwitchTransformers
    multiplies by the router's probability, which begins near 1 / E: ``scale=num_experts`` makes up for it.

    Args:
        model: one whose class `UPCYCLED` has. Its tensors go over to the result; it is of no more use.
        num_experts: E.
        k: experts per token; None = 2, or as many as the sparse architecture allows.
        every: one layer of so many is sparse: the last ones of Qwen3-MoE, the second ones of SwitchTransformers.
        perturb: changes the matrices of the copies, for example `moekit.experts.AddNoise`; None = equal copies, which
            only the router tells apart.
        scale: multiplies what an expert writes.
        seed: random seed of the routers' first weights and of the perturbation.
        aux: weights of the routers' losses, as `adopt` takes them.

    Returns:
        A model of the sparse class, adopted: `save_pretrained` writes a folder of that class.

    Raises:
        UserError: transformers has no sparse architecture for the model, or none with such layers or such settings. The
            model is as it was then.

    Source: arXiv:2212.05055. Differs: no token is dropped unless a capacity is set.
    """
    name = type(model).__name__
    entry = UPCYCLED.get(name)
    if entry is None:
        raise UserError(f"transformers has no sparse architecture to make of {name}. Known are {', '.join(UPCYCLED)}.")
    k = (entry.k or 2) if k is None else k
    _check(model, entry, num_experts, k, every)
    theirs, config = _blank(model, entry, num_experts, k, every)
    generator = torch.Generator().manual_seed(seed)
    dense = dict(model.named_modules())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, block in list(_feed_forwards(theirs, entry, config)):
            number, source = path
            there = dense[source]
            if entry.sparse(number, every):
                _fill(block, [getattr(there, part) for part in entry.parts], perturb, scale, generator)
            else:
                take(block, there)
    for path, module in theirs.named_modules():
        if path in dense:
            take(module, dense[path], recurse=False)
    missing = [path for path, tensor in (*theirs.named_parameters(), *theirs.named_buffers()) if tensor.is_meta]
    assert not missing, missing
    theirs.tie_weights()
    theirs.generation_config = model.generation_config
    return adopt(theirs.train(model.training), aux=aux)


def _check(model: Any, entry: Upcycling, num_experts: int, k: int, every: int) -> None:
    name = type(model).__name__
    if num_experts < 2 or not 1 <= k <= num_experts:
        raise UserError(
            f"upcycling needs at least 2 experts, and k of them for each token: got {num_experts} and k={k}."
        )
    if entry.k not in (None, k):
        raise UserError(f"{entry.target} sends each token to {entry.k} expert: got k={k}.")
    if every < 1 or (every > 1 and not entry.dense_layers):
        required = "at least 1" if entry.dense_layers else "1"
        raise UserError(
            f"{entry.target}, which {name} becomes, must have every={required}: got {every}"
            f"{'.' if entry.dense_layers else ', and it has no dense feed-forwards.'}"
        )
    for counted in entry.layers.values():
        count = getattr(model.config, counted)
        if not any(entry.sparse(layer, every) for layer in range(count)):
            raise UserError(f"with every={every} no layer of {count} would be sparse. Use a smaller number.")
    for field, wanted in entry.required.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if getattr(model.config, field, allowed[0]) not in allowed:
            raise UserError(
                f"{entry.target} needs a {name} with {field}={allowed[0]!r}: got {getattr(model.config, field)!r}."
            )
    for path, tensor in model.named_parameters():
        if not tensor.is_floating_point() or tensor.is_meta:
            raise UserError(
                f"upcycling needs weights of floating-point numbers with memory: {path} has {tensor.dtype}."
            )


def _blank(model: Any, entry: Upcycling, num_experts: int, k: int, every: int) -> tuple[Any, Any]:
    """The sparse model on the meta device, and its configuration."""
    import transformers

    given = {field: getattr(model.config, field) for field in entry.same if hasattr(model.config, field)}
    config = getattr(transformers, entry.config)(**given, **entry.fields(model.config, num_experts, k, every))
    # Another attention than eager may be none of the sparse architecture's: it chooses for itself.
    asked = {"attn_implementation": "eager"} if model.config._attn_implementation == "eager" else {}
    with torch.device("meta"):
        theirs = getattr(transformers, entry.target)._from_config(config, **asked)
    return theirs, config


def _feed_forwards(theirs: Any, entry: Upcycling, config: Any) -> Any:
    """Every feed-forward of the sparse model: its layer's number and its path in the dense model, and the module."""
    for stack in entry.layers:
        for number, block in enumerate(theirs.get_submodule(stack)):
            last = len(getattr(block, "layer", ())) - 1
            path = f"{stack}.{number}.{entry.dense.replace('{n}', str(last))}"
            yield (number, path), block.get_submodule(entry.feed_forward.replace("{n}", str(last)))


def _fill(
    block: Any, layers: Sequence[nn.Linear], perturb: Perturbation | None, scale: float, generator: torch.Generator
) -> None:
    """Give a sparse block copies of a dense feed-forward, and a router of its own."""
    *inner, outer = (layer.weight.detach() for layer in layers)

    def copies(weight: Tensor, num_experts: int) -> Tensor:
        made = weight.expand(num_experts, *weight.shape).clone()
        return made if perturb is None else perturb(made, generator)

    router = block.router if hasattr(block, "router") else block.gate
    scores = router.classifier if hasattr(router, "classifier") else router
    num_experts = scores.weight.shape[0]
    up = copies(torch.cat(inner), num_experts)
    down = copies(outer, num_experts) * scale if scale != 1 else copies(outer, num_experts)
    if isinstance(block.experts, nn.ModuleDict):
        experts: list[Any] = list(block.experts.values())
        for number, expert in enumerate(experts):
            expert.wi.weight, expert.wo.weight = nn.Parameter(up[number]), nn.Parameter(down[number])
    else:
        block.experts.gate_up_proj, block.experts.down_proj = nn.Parameter(up), nn.Parameter(down)
    weight = torch.empty(scores.weight.shape, dtype=torch.float32, device=outer.device)
    truncated_normal_(weight, weight.shape[1], _ROUTER_SCALE)
    scores.weight = nn.Parameter(weight.to(outer.dtype))


def take(mine: nn.Module, theirs: nn.Module, *, recurse: bool = True) -> None:
    """Take over a module's tensors, those of the same names, which stay the same objects."""
    for part in ("_parameters", "_buffers"):
        held: dict[str, Any] = getattr(mine, part)
        held.update({name: tensor for name, tensor in getattr(theirs, part).items() if name in held})
    if recurse:
        inside = dict(theirs.named_children())
        for name, child in mine.named_children():
            take(child, inside[name])
