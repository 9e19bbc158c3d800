"""SwitchTransformers and NllbMoe, adopted in place: what their routers say, in training too, and the same files."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import as_their_router_means, nllb, sentences, switch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from moekit.errors import UserError
from moekit.huggingface import AdoptedLayer, adopt, expert_modules, routings

QUIET: dict[str, Any] = {"dropout_rate": 0.0, "router_jitter_noise": 0.0}
STILL: dict[str, Any] = {
    "dropout": 0.0, "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "moe_token_dropout": 0.0,
}  # fmt: skip

# A plain one, then odd ones: one expert, all layers sparse, biases, room for one token, priority, a share of a batch.
CASES: dict[str, Callable[[], Any]] = {
    "switch": lambda: switch(**QUIET),
    "switch, one expert": lambda: switch(**QUIET, num_experts=1, expert_capacity=1, tie_word_embeddings=False),
    "switch, all sparse": lambda: switch(
        **QUIET, num_sparse_encoder_layers=4, num_sparse_decoder_layers=3, router_bias=True, expert_capacity=2,
        dense_act_fn="gelu",
    ),
    "nllb": lambda: nllb(**STILL, router_bias=True),
    "nllb, by probability": lambda: nllb(
        **STILL, batch_prioritized_routing=True, normalize_router_prob_before_dropping=True, expert_capacity=3,
        moe_eval_capacity_token_fraction=0.2, encoder_sparse_step=1,
    ),
    "nllb, two experts": lambda: nllb(
        **{**STILL, "moe_token_dropout": 0.3}, num_experts=2, expert_capacity=4, activation_function="silu",
        moe_eval_capacity_token_fraction=-1.0, tie_word_embeddings=False,
    ),
}  # fmt: skip
ONE_OF_EACH = ["switch", "nllb, by probability"]


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    as_their_router_means(monkeypatch)


def inputs(pad: int) -> dict[str, Tensor]:
    source, mask, target = sentences(pad)
    return {"input_ids": source, "attention_mask": mask.long(), "labels": target}


def theirs_and_ours(name: str) -> tuple[Any, Any]:
    theirs = CASES[name]()
    return theirs, adopt(copy.deepcopy(theirs), aux=None)


def ours_by_their_names(found: nn.Module) -> dict[str, Tensor]:
    """Gradients of an adopted model under the names of the original."""
    grads: dict[str, Tensor] = {}
    for name, parameter in found.named_parameters():
        if parameter.grad is None:
            continue
        stem, _, last = name.rpartition(".")
        if stem.endswith("experts"):
            layer, kind = {"w_in": (0, "weight"), "w_out": (1, "weight"), "b_in": (0, "bias"), "b_out": (1, "bias")}[
                last
            ]
            inner = (("fc1", "fc2") if ".ffn." in name else ("wi", "wo"))[layer]
            for e, grad in enumerate(parameter.grad):
                grads[f"{stem}.expert_{e}.{inner}.{kind}"] = grad.t()
        elif stem.endswith("router"):
            grads[f"{stem}.classifier.{last}"] = parameter.grad
        else:
            grads[name] = parameter.grad
    return grads


def assert_same_by_their_names(theirs: nn.Module, ours: nn.Module) -> None:
    found = ours_by_their_names(ours)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:  # of an expert whom no token came to, or unused
            assert name not in found or not found[name].any(), name
            continue
        grad = parameter.grad
        close = 1e-5 * max(float(grad.abs().max()), 1e-3)
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=close, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_an_adopted_encoder_decoder_equals_the_original(name: str, tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours(name)
    layers = [module for module in ours.modules() if isinstance(module, AdoptedLayer)]
    assert layers
    given = inputs(theirs.config.pad_token_id)
    with torch.no_grad(), routings(ours) as heard:
        torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=1e-5, atol=1e-5)
    assert len(heard) == len(layers)
    source, mask = given["input_ids"], given["attention_mask"]
    texts = [m.generate(source, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (theirs, ours)]
    assert torch.equal(*texts)

    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert torch.equal(adopt(again, aux=None)(**given).logits, ours(**given).logits)


def sum_in_training(self: Any, hidden: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """`as_their_router_means` in training: their dropout on what each expert writes."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    _, weight, _ = self.router(flat, padding_mask)
    parts = (weight[:, e, None] * self.experts[f"expert_{e}"](flat) for e in range(self.num_experts))
    return sum(self.experts.token_dropout(part) for part in parts).view_as(hidden)


def drop_what_is_negative(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that does not depend on the order in which rows come."""
    return x.clamp_min(0) / (1 - p) if training and p else x


@pytest.mark.parametrize("name", CASES)
def test_an_adopted_encoder_decoder_trains_as_the_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NllbMoeSparseMLP, "forward", sum_in_training)
    monkeypatch.setattr(F, "dropout", drop_what_is_negative)
    monkeypatch.setattr(expert_modules, "dropout", drop_what_is_negative)
    theirs, ours = theirs_and_ours(name)
    given = inputs(theirs.config.pad_token_id)
    dropped = []
    for found in (theirs.train(), ours.train()):
        with routings(ours) as heard:
            out = found(**given)
        out.loss.backward()
        dropped += [int((routing.queued & ~routing.kept).sum()) for routing in heard]
    if "prob" in name or "all sparse" in name:
        assert sum(dropped) > 0, "a case in which nothing is dropped says nothing of who is"
    assert_same_by_their_names(theirs, ours)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_recomputed_blocks_keep_the_masks_of_encoder_and_decoder(name: str) -> None:
    plain = adopt(CASES[name](), aux=None).train()
    kept = copy.deepcopy(plain)
    kept.gradient_checkpointing_enable()
    given = inputs(plain.config.pad_token_id)
    target = given.pop("labels")
    first = {**given, "decoder_input_ids": target, "decoder_attention_mask": torch.ones_like(target)}
    first["decoder_attention_mask"][1, -4:] = 0
    second = {"input_ids": given["input_ids"].flip(0), "decoder_input_ids": target.flip(0)}
    for found in (plain, kept):
        one, two = (found(**x, use_cache=False).logits.square().mean() for x in (first, second))
        (one + 2 * two).backward()  # two forwards before their backward
    for (path, a), b in zip(plain.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=path)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_padding_is_routed_on_neither_side(name: str) -> None:
    ours = adopt(CASES[name](), aux=None)
    given = inputs(ours.config.pad_token_id)
    target = given.pop("labels")
    mask = torch.ones_like(target)
    mask[2, 3:] = 0
    with torch.no_grad(), routings(ours) as heard:
        ours(**given, decoder_input_ids=target, decoder_attention_mask=mask)
    sizes = {given["attention_mask"].numel(): given["attention_mask"], mask.numel(): mask}
    assert len({routing.num_tokens for routing in heard}) == 2
    for routing in heard:
        real = sizes[routing.num_tokens].flatten().nonzero().flatten()
        assert torch.equal(routing.token[routing.queued].unique(), real)
    hooked: list[Any] = []
    layer = (
        next(module for module in ours.encoder.modules() if isinstance(module, AdoptedLayer))
        if name == "switch"
        else next(module for module in ours.model.encoder.modules() if isinstance(module, AdoptedLayer))
    )
    layer.register_forward_hook(lambda _, __, output: hooked.append(output.routing))
    ours.generate(given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=2, do_sample=False)
    real = given["attention_mask"].flatten().nonzero().flatten()
    assert torch.equal(hooked[0].token[hooked[0].queued].unique(), real), "generate calls the encoder by itself"


def test_jitter_is_that_of_the_original() -> None:
    theirs = switch(dropout_rate=0.0, router_jitter_noise=0.3).train()
    ours = adopt(copy.deepcopy(theirs), aux=None)
    given, losses = inputs(0), []
    for found in (theirs, ours):
        torch.manual_seed(3)
        losses.append(found(**given).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert_same_by_their_names(theirs, ours)


@pytest.mark.parametrize("policy", ["random", "sampling"])
def test_second_experts_of_training_are_drawn_as_there(policy: str) -> None:
    """How often each expert is the second, over many draws, is what their router gives."""
    theirs = nllb(**STILL, second_expert_policy=policy, expert_capacity=10_000)
    ours = adopt(copy.deepcopy(theirs), aux=None)
    router = theirs.model.encoder.layers[1].ffn.router
    layer = ours.model.encoder.layers[1].ffn
    for module in (router, layer):
        module.train()
    torch.manual_seed(0)
    states, draws = torch.randn(7, 24), 4000
    many = states.repeat(draws, 1)
    with torch.no_grad():
        _, weight, _ = router(many)
        routing = layer.router(many)
    mine = torch.zeros_like(weight)
    mine[routing.token[routing.kept], routing.expert[routing.kept]] = routing.weight[routing.kept]
    expected, got = (w.view(draws, 7, -1).mean(0) for w in (weight, mine))
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.025)
    assert float((got - expected).abs().mean()) < 0.006


def test_what_transformers_gets_wrong_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        adopt(nllb(**STILL), aux=None)
    assert "whichever its router chose" in caplog.text


def test_losses_are_added_in_training() -> None:
    theirs, given = CASES["switch"](), inputs(0)
    ours = adopt(copy.deepcopy(theirs)).train()
    with routings(ours) as heard:
        loss = ours(**given).loss
    balance = torch.stack([routing.losses["load_balance"] for routing in heard]).mean()
    expected = theirs.train()(**given).loss + ours.config.router_aux_loss_coef * balance
    torch.testing.assert_close(loss, expected)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "precision": (lambda: switch(router_dtype="bfloat16"), "router_dtype"),
    "padding": (lambda: nllb(router_ignore_padding_tokens=True), "router_ignore_padding_tokens"),
    "weights": (
        lambda: nllb(second_expert_policy="random", normalize_router_prob_before_dropping=True), "second_expert_policy",
    ),
    "policy": (lambda: nllb(second_expert_policy="best"), "second_expert_policy"),
    "one expert": (lambda: nllb(num_experts=1), "num_experts=1"),
    "activation": (lambda: switch(dense_act_fn="prelu"), "PReLU"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_said_is_refused_by_name(name: str) -> None:
    make, words = REFUSED[name]
    found = make()
    kinds = [type(module) for module in found.modules()]
    with pytest.raises(UserError, match=words):
        adopt(found)
    assert [type(module) for module in found.modules()] == kinds
