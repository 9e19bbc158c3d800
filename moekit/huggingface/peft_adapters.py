"""Low-rank adapters of adopted models in the format of PEFT, which opens them without moekit, and back.

add_adapters(model, targets=("experts", "routers", "attention"))     # moekit.surgery
...                                                                  # train
write_adapters(model, "adapter")         # peft.PeftModel.from_pretrained(base, "adapter")
read_adapters(adopt(base), "adapter")    # or merge_adapters afterwards
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moekit.atomic import replacing_path, write_json, writing
from moekit.errors import UserError
from moekit.experts import Experts
from moekit.huggingface.adopted_layer import AdoptedLayer
from moekit.huggingface.card import write_card
from moekit.huggingface.expert_modules import ModuleExperts
from moekit.mapped import read_safetensors, write_safetensors
from moekit.parallel.checkpoint.checkpointer import PathLike
from moekit.parallel.shards import full_tensor
from moekit.routing import Router
from moekit.stored import parse_json
from moekit.surgery.adapters import LowRank, attach, is_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN: Mapping[str, Any] = {
    "bias": "none", "fan_in_fan_out": False, "use_dora": False, "lora_bias": False, "modules_to_save": None,
    "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None,
}  # fmt: skip
"""Settings of PEFT that must have these values: others are something else than a product added to a matrix."""
_VARIANTS = (
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Settings that, where they are given, make it something else too. Older versions of PEFT do not know them."""
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations, as `init_lora_weights` begins, by which PEFT changes the weights of the model itself."""

_RENAMED = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of linear layers that PEFT takes for those of experts of former versions: these are named by their weights."""


@dataclass(frozen=True)
class _Place:
    """A matrix that can have a pair, and what PEFT calls it.

    Attributes:
        layer: the module that `attach` is given.
        path: the matrix's name in it.
        key: PEFT's name of the adapted module, without the prefix, which several parameters of a module share.
        parameter: the full name of the parameter, where it is no linear layer's.
        expert: the one of a bank's pairs that it is, where experts are modules there.
    """

    layer: nn.Module
    path: str
    key: str
    parameter: str | None = None
    expert: int | None = None

    @property
    def pair(self) -> LowRank | None:
        """What is there."""
        if isinstance(self.layer, Experts):
            found: Any = self.layer._adapter(self.path)
        else:
            found = self.layer.get_submodule(self.path.removesuffix("weight").removesuffix("."))._modules.get("adapter")
        return found if isinstance(found, LowRank) else None


def write_adapters(
    model: Any, folder: PathLike, *, base: str | None = None, card: Mapping[str, Any] | None = None
) -> None:
    """Write the adapters of an adopted model as ``adapter_config.json`` and ``adapter_model.safetensors``, and a card.

    Of a divided model all ranks call it together; rank 0 writes.

    Args:
        model: adopted, with adapters of one rank and one alpha.
        folder: files that are there are replaced.
        base: the name or folder of the model without adapters; None = that in its configuration.
        card: what is known of them, as `moekit.huggingface.write_card` takes it.

    Raises:
        UserError: there is no adapter, ranks differ, or one is on something that PEFT cannot adapt.

    Source: the format of PEFT 0.21 (``target_parameters`` of fused experts). Differs: targets are full names.
    """
    places = [place for place in _places(model) if place.pair is not None]
    pairs = {id(place.pair) for place in places}
    lost = [name for name, module in model.named_modules() if isinstance(module, LowRank) and id(module) not in pairs]
    if lost or not places:
        raise UserError(
            f"{type(model).__name__} must have adapters that PEFT knows: got {lost[0] if lost else 'none'}. Adapt an "
            "adopted model with moekit.surgery.add_adapters."
        )
    sizes = {(place.pair.rank, place.pair.alpha) for place in places if place.pair is not None}
    if len(sizes) > 1:
        raise UserError(f"adapters written together must have one rank and one alpha: got {sorted(sizes)}.")
    rank, alpha = sizes.pop()
    tensors: dict[str, Tensor] = {}
    for place, name in zip(places, _nested(places), strict=True):
        assert place.pair is not None
        down, up = (full_tensor(tensor.detach()).cpu() for tensor in (place.pair.down, place.pair.up))
        if place.expert is not None:
            down, up = down[place.expert], up[place.expert]
        a, b = (down.t(), up.t()) if down.ndim == 2 else _to_peft(down, up)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": base or getattr(model.config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "target_modules": sorted({place.key for place in places if place.parameter is None}),
        "target_parameters": sorted({place.parameter for place in places if place.parameter is not None}) or None,
        **_PLAIN,
    }
    target = Path(os.path.abspath(folder))
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        with replacing_path(target / WEIGHTS) as draft:
            write_safetensors(tensors, draft)
        write_json(target / CONFIG, config)
    write_card(target, **{"base": config["base_model_name_or_path"], **(card or {})})


@torch.no_grad()
def read_adapters(model: Any, folder: PathLike) -> list[str]:
    """Give an adopted model the adapters of a folder that PEFT or `write_adapters` wrote, in place.

    Args:
        model: adopted, and without adapters; whole, not yet divided.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Names of the new parameters.

    Raises:
        UserError: it is no LoRA, has settings or tensors that are no pairs of matrices of this model, was initialized
            by changing the weights of the model (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), or another adapter is there.
            The model is as it was then.
    """
    place = Path(os.path.abspath(folder))
    config = _config(place)
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise UserError("the model has adapters already: merge them first (moekit.surgery.merge_adapters).")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("adapters are read into a model with weights: it is on the meta device. Read the model first.")
    stored = {name: mapped.tensor() for name, mapped in read_safetensors(place / WEIGHTS).items()}
    rank, targets = config["r"], tuple(config.get("target_parameters") or ())
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    # Which parameters of a module are adapted decides their names: all others are known by their names alone.
    known = [p for p in _places(model) if not isinstance(p.layer, Experts) or _is_targeted(p, targets)]
    found: dict[tuple[int, str], list[tuple[_Place, Tensor, Tensor]]] = {}
    for one, name in zip(known, _nested(known), strict=True):
        a, b = (stored.pop(f"{_PREFIX}{name}.lora_{letter}.weight", None) for letter in "AB")
        if (a is None) != (b is None):
            raise UserError(f"{place / WEIGHTS} has half a pair of {name}: lora_A and lora_B belong together.")
        if a is not None and b is not None:
            found.setdefault((id(one.layer), one.path), []).append((one, a, b))
    if stored or not found:
        raise UserError(
            f"{place / WEIGHTS} must hold pairs for matrices of {type(model).__name__}: "
            f"{next(iter(stored), 'there are none')} is none of them."
        )
    for parts in found.values():
        _check_shapes(place, parts, rank)
    for parts in found.values():
        first = parts[0][0]
        pair = attach(first.layer, first.path, rank, scale * rank)
        for one, a, b in parts:
            if one.expert is not None:
                pair.down[one.expert], pair.up[one.expert] = a.t(), b.t()
                continue
            down, up = (a.t(), b.t()) if pair.down.ndim == 2 else _from_peft(a, b, pair.down.shape[0])
            pair.down.copy_(down)
            pair.up.copy_(up)
    return [name for name, _ in model.named_parameters() if is_adapter(name)]


def _to_peft(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Float[E, I, r] and Float[E, r, O] as PEFT's Float[E r, I] and Float[O, r E], in which experts come last."""
    return down.transpose(1, 2).flatten(0, 1), up.permute(2, 1, 0).flatten(1, 2)


def _from_peft(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    down = a.unflatten(0, (num_experts, -1)).transpose(1, 2)
    return down, b.unflatten(1, (-1, num_experts)).permute(2, 1, 0)


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every matrix of an adopted model that PEFT can adapt, in the order in which it comes to them."""
    for path, module in model.named_modules():
        if isinstance(module, ModuleExperts):
            for name, layer in zip(("w_in", "w_out"), module.layer_names, strict=True):
                for expert in range(module.num_experts):
                    yield _Place(module, name, f"{path}.expert_{expert}.{layer}", expert=expert)
        elif isinstance(module, Experts):
            for name in (name for name in module._parameters if name in module.matrices):
                yield _Place(module, name, path, f"{path}.{name}")
        elif isinstance(module, Router):
            parent = model.get_submodule(path.rpartition(".")[0])
            if isinstance(parent, AdoptedLayer) and isinstance(parent.experts, ModuleExperts):
                yield _Place(module, "weight", f"{path}.classifier")
            elif "weight" in module._parameters:
                yield _Place(module, "weight", path, f"{path}.weight")
        else:
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    key = f"{path}.{name}".lstrip(".")
                    yield _Place(module, f"{name}.weight", key, f"{key}.weight" if name in _RENAMED else None)


def _nested(places: list[_Place]) -> Iterator[str]:
    """PEFT's names: where several parameters of a module are adapted, the last one's wraps that of the one before."""
    for place in places:
        later = [other for other in places if other.key == place.key]
        yield place.key + ".base_layer" * (len(later) - 1 - later.index(place))


def _is_targeted(place: _Place, targets: tuple[str, ...]) -> bool:
    name = place.parameter
    return name is None or any(name == target or name.endswith(f".{target}") for target in targets)


def _check_shapes(folder: Path, parts: list[tuple[_Place, Tensor, Tensor]], rank: int) -> None:
    for one, a, b in parts:
        layer = one.layer
        if isinstance(layer, Experts):
            experts, inputs, outputs = layer.inputs_first(one.path).shape
            experts = 1 if one.expert is not None else experts
        else:
            outputs, inputs = layer.get_parameter(one.path).shape
            experts = 1
        wanted = ((rank * experts, inputs), (outputs, rank * experts))
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise UserError(
                f"{folder / WEIGHTS}: the pair of {one.parameter or one.key} must have shapes {wanted[0]} and "
                f"{wanted[1]}: got {tuple(a.shape)} and {tuple(b.shape)}."
            )
        if isinstance(layer, Experts) and one.expert is not None and len(parts) != layer.num_experts:
            raise UserError(
                f"{folder / WEIGHTS} must adapt all {layer.num_experts} experts of {one.key} or none: got {len(parts)}."
            )


def _config(folder: Path) -> dict[str, Any]:
    """The settings of a folder of PEFT.

    Raises:
        UserError: they are not there, or of something else.
    """
    try:
        config: dict[str, Any] = parse_json((folder / CONFIG).read_bytes())
        kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} must be the configuration of an adapter of PEFT: {error!r}.") from None
    if kind != "LORA" or type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(
            f"{folder / CONFIG} must be of a LORA with a rank r and lora_alpha: got {kind}, {rank}, {alpha}."
        )
    for name, plain in _PLAIN.items():
        value = config.get(name, plain)
        if value != plain and (value or plain):
            raise UserError(f"{folder / CONFIG}: {name} must be {plain!r}: got {value!r}, which is not read here.")
    for name in _VARIANTS:
        if config.get(name):
            raise UserError(
                f"{folder / CONFIG}: {name} must not be given: got {config[name]!r}, which is not read here."
            )
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGING):
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights must leave the weights of the model as they are: got "
            f"{config['init_lora_weights']!r}, by which PEFT changes them, so the adapter is of another model. Convert "
            "it with PEFT (save_pretrained with path_initial_model_for_weight_conversion), or merge it there "
            "(merge_and_unload) and give the merged folder."
        )
    return config
