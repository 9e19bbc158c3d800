"""What an adopted model hears of its routers: masks of their own forwards, and the losses that training adds."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from adoptable import V, assert_same_gradients, left_padded, model, tokens
from torch import Tensor

from moekit import AuxLosses
from moekit.errors import UserError
from moekit.huggingface import adopt, routings


@pytest.mark.parametrize("block", ["MixtralSparseMoeBlock", "DeepseekV3MoE", "DeepseekV2Moe"])
def test_checkpointed_blocks_keep_the_mask_of_their_own_forward(block: str) -> None:
    plain, (ids, mask) = adopt(model(block)).train(), left_padded()
    kept = copy.deepcopy(plain)
    kept.gradient_checkpointing_enable()
    others = mask.flip(1)
    for found in (plain, kept):
        one = found(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        two = found(tokens(7), labels=ids, use_cache=False).loss
        three = found(ids.flip(1), attention_mask=others, labels=ids, use_cache=False).loss
        (one + 2 * two + 3 * three).backward()  # three forwards before their backward
    assert_same_gradients(plain, kept)


def test_checkpoints_that_lose_the_losses_are_refused() -> None:
    ours, (ids, mask) = adopt(model()).train(), left_padded()
    ours.gradient_checkpointing_enable({"use_reentrant": True})
    ours.enable_input_require_grads()
    with pytest.raises(UserError, match="use_reentrant"):
        ours(ids, attention_mask=mask, labels=ids, use_cache=False)
    ours.eval()(ids, attention_mask=mask)


def test_a_recomputed_mask_is_not_that_of_the_next_call() -> None:
    theirs, (ids, mask) = model(), left_padded()
    ours, other = adopt(copy.deepcopy(theirs)).train(), tokens(9)
    ours.gradient_checkpointing_enable()
    ours(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        got, expected = (found.eval().model(other).last_hidden_state for found in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_threads_have_forwards_of_their_own() -> None:
    ours, (ids, mask) = adopt(model()), left_padded()
    with torch.no_grad():
        alone = ours(ids, attention_mask=mask).logits[mask.bool()]
    got: list[Tensor] = []

    def padded() -> None:
        with torch.no_grad():
            got.append(ours(ids, attention_mask=mask).logits[mask.bool()])

    def amid(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=padded)
        thread.start()
        thread.join()

    full = tokens(9)
    with torch.no_grad():
        expected = ours(full, attention_mask=torch.ones_like(full)).logits
        handle = ours.model.layers[1].register_forward_pre_hook(amid)
        with routings(ours) as heard:
            torch.testing.assert_close(ours(full).logits, expected)
    assert len(heard) == 2
    torch.testing.assert_close(got[0], alone)


def test_losses_are_added_to_a_tuple_too() -> None:
    ours, ids = adopt(model()).train(), tokens()
    expected = ours(ids, labels=ids)
    loss, logits = ours(ids, labels=ids, return_dict=False, use_cache=False)[:2]
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(ours(ids, return_dict=False)[0], expected.logits)


def test_losses_of_routers_are_added_in_training_alone() -> None:
    ids = tokens()
    plain, ours = model(), adopt(model())
    assert ours(ids, labels=ids).loss.item() == pytest.approx(plain(ids, labels=ids).loss.item(), rel=1e-6)
    ours.train()
    with routings(ours) as heard:
        out = ours(ids, labels=ids)
    assert len(heard) == 2
    total, terms = AuxLosses(layers="mean", load_balance=2 * ours.config.router_aux_loss_coef)(*heard)
    assert total.item() > 0
    assert (out.loss - total).item() == pytest.approx(plain(ids, labels=ids).loss.item(), rel=1e-6)
    assert out.aux_loss.item() == pytest.approx(terms["load_balance"].item())
    gate = [ours.get_parameter("model.layers.0.mlp.gate.weight")]
    (whole,) = torch.autograd.grad(out.loss, gate, retain_graph=True)
    (of_losses,) = torch.autograd.grad(total, gate)
    torch.testing.assert_close(
        whole - of_losses,
        torch.autograd.grad(plain(ids, labels=ids).loss, [plain.get_parameter("model.layers.0.mlp.gate.weight")])[0],
    )
    assert of_losses.abs().sum().item() > 0


def test_losses_of_ones_own() -> None:
    ids = tokens()
    ours = adopt(model(), aux=AuxLosses(load_balance=0.5)).train()
    with routings(ours) as heard:
        loss = ours(ids, labels=ids).loss
    plain = adopt(model(), aux=None).train()
    expected = AuxLosses(load_balance=0.5)(*heard)[0]
    assert (loss - plain(ids, labels=ids).loss).item() == pytest.approx(expected.item(), rel=1e-3)
    assert ours(ids).loss is None, "without labels there is no loss to add to"


def test_a_failed_forward_leaves_no_trace() -> None:
    ours, ids = adopt(model()).train(), tokens()
    expected = ours(ids, labels=ids).loss
    with pytest.raises(IndexError), routings(ours) as heard:
        ours(torch.full((1, 3), V))
    assert heard == []
    assert torch.equal(ours(ids, labels=ids).loss, expected)


def test_copies_and_pickles_hear_for_themselves() -> None:
    ours, ids = adopt(model()).train(), tokens()
    expected = ours(ids, labels=ids).loss
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with routings(ours) as mine, routings(other) as heard:
            assert torch.equal(other(ids, labels=ids).loss, expected)
        assert (len(mine), len(heard)) == (0, 2)
