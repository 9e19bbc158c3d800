"""What is not adopted is refused by name, and stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adoptable import COMMON, model, tokens, transformers
from torch import nn

from moekit.errors import UserError
from moekit.huggingface import adopt, routings


def dense() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))


def with_unknown_block() -> Any:
    class NewExperts(nn.Linear):
        pass

    found = model()
    found.model.layers[1].extra = NewExperts(2, 2)
    return found


def as_of_old() -> Any:
    found = model("MixtralSparseMoeBlock")
    block = found.model.layers[1].mlp
    block.experts = nn.ModuleList([nn.Linear(2, 2)])
    return found


def quantized() -> Any:
    found = model()
    experts = found.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)
    return found


def loaded_by_parts() -> Any:
    found = model()
    found.model.layers[1].mlp.experts._hf_hook = object()
    return found


def wanting_logits() -> Any:
    return model(output_router_logits=True)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dense": (dense, "no sparse block"),
    "unknown": (with_unknown_block, "NewExperts"),
    "older": (as_of_old, "transformers>=5"),
    "quantized": (quantized, "quantization"),
    "by parts": (loaded_by_parts, "device_map"),
    "router logits": (wanting_logits, "output_router_logits"),
    "twice": (lambda: adopt(model()), "adopted already"),
    "a block": (lambda: model().model.layers[0].mlp, "the sparse block"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_stay_as_they_are(name: str) -> None:
    make, words = REFUSED[name]
    found = make()
    kinds = [type(module) for module in found.modules()]
    hooks = len(found._forward_pre_hooks)
    with pytest.raises(UserError, match=words):
        adopt(found)
    assert [type(module) for module in found.modules()] == kinds
    assert len(found._forward_pre_hooks) == hooks


def test_what_cannot_be_asked_of_an_adopted_model() -> None:
    ours = adopt(model())
    with pytest.raises(UserError, match="routings"):
        ours(tokens(), output_router_logits=True)
    with pytest.raises(UserError, match="adopt"), routings(model()):
        pass
