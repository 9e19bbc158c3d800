"""Models of transformers, adopted: the same logits, gradients, texts and files, for every architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adoptable import (
    CASES,
    CONFIGS,
    assert_same_gradients,
    generated,
    gradients,
    left_padded,
    model,
    tokens,
)
from torch import Tensor

from moekit.huggingface import SPARSE_BLOCKS, AdoptedLayer, adopt, routings
from moekit.layer import MoELayer, MoEOutput
from moekit.routing import Capacity


def test_every_known_block_has_cases() -> None:
    encoder_decoders = {"SwitchTransformersSparseMLP", "NllbMoeSparseMLP"}  # in test_adopt_encoder_decoder.py
    assert CONFIGS.keys() | encoder_decoders == SPARSE_BLOCKS.keys()
    assert all(len(made) == 3 for _, made in CONFIGS.values())


@pytest.mark.parametrize(("block", "number"), CASES, ids=[f"{block}-{n}" for block, n in CASES])
def test_adopted_equals_original(block: str, number: int, tmp_path: Path) -> None:
    theirs = model(block, number)
    ours = copy.deepcopy(theirs)
    before = {name: id(p) for name, p in ours.named_parameters()}
    assert adopt(ours, aux=None) is ours
    assert {name: id(p) for name, p in ours.named_parameters()} == before, "parameters are the same objects, in order"
    assert any(type(module) is AdoptedLayer for module in ours.modules())
    assert not any(type(module).__name__ in SPARSE_BLOCKS for module in ours.modules())

    ids = tokens()
    for found in (theirs, ours):
        found(ids, labels=ids).loss.backward()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert_same_gradients(theirs, ours)
    assert torch.equal(generated(ours, ids[:, :3]), generated(theirs, ids[:, :3]))

    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("block", CONFIGS)
def test_padding_is_not_routed(block: str) -> None:
    theirs = model(block)
    ours, (ids, mask) = adopt(copy.deepcopy(theirs), aux=None), left_padded()
    real = mask.bool()
    with routings(ours) as heard:
        got = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[real], theirs(ids, attention_mask=mask).logits[real], rtol=1e-5, atol=1e-5)
    assert torch.equal(generated(ours, ids, mask), generated(theirs, ids, mask))
    for routing in heard:
        kept = routing.token[routing.kept].unique()
        assert torch.equal(kept, real.flatten().nonzero().flatten())


def test_layers_are_those_of_moekit() -> None:
    ours, ids = adopt(model("Qwen2MoeSparseMoeBlock")), tokens()
    layer = next(module for module in ours.modules() if isinstance(module, MoELayer))
    outputs: list[Any] = []
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    ours(ids)
    handle.remove()
    assert isinstance(outputs[0], MoEOutput)
    assert layer.router is layer.gate
    assert layer.shared is layer.shared_expert
    layer.router.capacity = Capacity(train=0.5, minimum=1)
    ours.train()
    with routings(ours) as heard:
        ours(ids, labels=ids).loss.backward()
    assert int((~heard[0].kept).sum()) > 0
    layer.router = copy.deepcopy(layer.router)
    assert "router" not in layer._modules
    del layer.shared
    assert not hasattr(layer, "shared_expert")


def test_jitter_is_that_of_the_original() -> None:
    theirs = model("MixtralSparseMoeBlock", router_jitter_noise=0.3).train()
    ours, ids = adopt(copy.deepcopy(theirs), aux=None), tokens()
    losses = []
    for found in (theirs, ours):
        torch.manual_seed(3)
        losses.append(found(ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert_same_gradients(theirs, ours)
    torch.manual_seed(4)
    assert not torch.equal(ours(ids, labels=ids).loss, losses[1])


@pytest.fixture
def repeated_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The same uniform and exponential numbers, whatever is drawn in between: a call begins anew."""
    drawn = {"n": 0}

    def uniform(like: Tensor) -> Tensor:
        drawn["n"] += 1
        return torch.rand(like.shape, generator=torch.Generator().manual_seed(drawn["n"]))

    def begin() -> None:
        drawn["n"] = 0
        monkeypatch.setattr(Tensor, "exponential_", lambda self: self.copy_(-uniform(self).log()))
        monkeypatch.setattr(torch, "rand_like", uniform)
        monkeypatch.setattr(Tensor, "uniform_", lambda self, *_: self)  # transformers draws once more

    return begin


@pytest.mark.parametrize("number", range(3))
def test_sparse_mixer_trains_as_the_original(number: int, repeated_draws: Callable[[], None]) -> None:
    theirs = model("PhimoeSparseMoeBlock", number).train()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if name.endswith("router.weight"):
                tensor.mul_(0.05)  # scores that are near each other, so that draws decide
    ours, ids = adopt(copy.deepcopy(theirs), aux=None), tokens(5, 6, 12)
    losses = []
    for found in (theirs, ours):
        repeated_draws()
        losses.append(found(ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)  # there a third is 0.3333
    for name, grad in gradients(theirs).items():
        close = 1e-3 * max(float(grad.abs().max()), 1e-3)
        torch.testing.assert_close(gradients(ours)[name], grad, rtol=1e-3, atol=close, msg=name)


def test_low_precision_keeps_scores_in_float32() -> None:
    theirs = model("OlmoeSparseMoeBlock")
    ours = adopt(copy.deepcopy(theirs).to(torch.bfloat16), aux=None)
    with routings(ours) as heard:
        logits = ours(tokens()).logits
    assert logits.dtype == torch.bfloat16
    assert heard[0].weight.dtype == torch.float32
    assert float((logits.float() - theirs(tokens()).logits).detach().abs().max()) < 0.2


def test_compiles_in_one_graph() -> None:
    ours, ids = adopt(model("DeepseekV3MoE"), aux=None), tokens()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, ours(ids, use_cache=False).logits)
