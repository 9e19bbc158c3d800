"""The Switch layer beside `SwitchTransformersSparseMLP` of Hugging Face transformers, with its weights copied over.

Outputs, decisions and gradients are equal. Where transformers does otherwise than the paper, and moekit does not, the
difference itself is asserted: such a test fails when transformers changes, and then the note in it is out of date.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from moekit import MoELayer, routers
from moekit.experts import GroupedMLP
from moekit.functional import load_balance, router_z
from moekit.routing import Capacity, RoutingContext
from moekit.testing import assert_close, seeded, skewed_tokens

pytest.importorskip("transformers", reason="parity is with transformers, of the extra test")
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    load_balancing_loss_func,
    router_z_loss_func,
)

S, D, F, E = 24, 8, 12, 4


def config(**changes: object) -> SwitchTransformersConfig:
    options = {
        "d_model": D, "d_ff": F, "num_experts": E, "expert_capacity": 5, "dropout_rate": 0.0,
        "router_jitter_noise": 0.0, "vocab_size": 32, "num_layers": 4, "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_heads": 2, "d_kv": 4,
    }  # fmt: skip
    return SwitchTransformersConfig(**(options | changes))


def pair(jitter: float = 0.0, **changes: object) -> tuple[SwitchTransformersSparseMLP, MoELayer]:
    """Their layer and ours with the same weights; our capacity is theirs for one sequence of S tokens."""
    theirs = SwitchTransformersSparseMLP(config(router_jitter_noise=jitter, **changes))
    capacity = Capacity(train=5 * E / S, eval=5 * E / S, minimum=1)
    router = routers.TopKRouter(D, E, capacity=capacity, exploration=routers.InputJitter(jitter) if jitter else None)
    ours = MoELayer(router, GroupedMLP(E, D, F))
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(1)))
        router.weight.copy_(theirs.router.classifier.weight)
        for e in range(E):
            expert = theirs.experts[f"expert_{e}"]
            ours.experts.w_in[e].copy_(expert.wi.weight.t())
            ours.experts.w_out[e].copy_(expert.wo.weight.t())
    return theirs, ours


def tokens(sequences: int = 1) -> Tensor:
    return skewed_tokens(sequences * S, D, seed=2).view(sequences, S, D) / 2


@pytest.mark.parametrize("training", [True, False])
def test_outputs_decisions_and_gradients(training: bool) -> None:
    theirs, ours = (layer.train(training) for layer in pair())
    x = tokens().requires_grad_()
    hidden, routing = ours(x)
    expected = theirs(x)
    assert_close(hidden, expected, "output")
    dispatched, gate, logits = theirs.router(x)
    kept = routing.kept
    assert 0 < int(kept.sum()) < S, "some tokens are dropped, some not"
    found = torch.zeros(S, E, dtype=torch.int64)
    found[routing.token[kept], routing.expert[kept]] = 1
    assert torch.equal(found, dispatched[0])
    assert_close(routing.weight, gate[0, :, 0])
    assert_close(routing.losses["router_z"], router_z_loss_func(logits))

    names = [f"experts.expert_{e}.{part}.weight" for e, part in itertools.product(range(E), ("wi", "wo"))]
    theirs_of = dict(theirs.named_parameters())
    probe = torch.cos(torch.arange(S * D)).view(1, S, D)
    leaves = [x, ours.router.weight, ours.experts.w_in, ours.experts.w_out]
    their_leaves = [x, theirs.router.classifier.weight, *(theirs_of[name] for name in names)]
    mine = torch.autograd.grad((hidden * probe).sum(), leaves)
    want = torch.autograd.grad((expected * probe).sum(), their_leaves, materialize_grads=True)
    assert_close(mine[0], want[0], "gradient of x")
    assert_close(mine[1], want[1], "gradient of the router")
    stacked = torch.stack([grad.t() for grad in want[2::2]]), torch.stack([grad.t() for grad in want[3::2]])
    assert_close(mine[2], stacked[0], "gradient of w_in")
    assert_close(mine[3], stacked[1], "gradient of w_out")


def test_their_capacity_is_by_sequence() -> None:
    """Two sequences: theirs counts each apart, ours the batch of a process; one sequence at a time they agree."""
    theirs, ours = pair()
    x = tokens(2)
    assert_close(torch.cat([ours(row[None]).hidden for row in x]), theirs(x))
    dispatched = theirs.router(x)[0]
    routing = ours(x).routing
    assert routing.capacity == 10
    assert int(dispatched.sum(1).max()) == 5
    assert int(torch.bincount(routing.expert[routing.kept]).max()) > 5
    with pytest.raises(AssertionError):
        assert_close(ours(x).hidden, theirs(x))


def test_their_jitter_also_changes_what_the_experts_see() -> None:
    """It multiplies the router's input in place, and where that is float32 already, it is the experts' input too."""
    theirs, ours = (layer.train() for layer in pair(jitter=0.3))
    x = tokens()
    with seeded(5):
        noise = torch.empty_like(x).uniform_(0.7, 1.3)
    with seeded(5):
        hidden, routing = ours(x)
    given = x.clone()
    with seeded(5):
        found = theirs(given)
    assert_close(given, x * noise, "their input after the call")
    still = copy.deepcopy(ours)
    still.router.exploration = None
    assert_close(found, still(x * noise).hidden, "theirs: jittered for all")
    weight = torch.zeros(S, 1).index_add(0, routing.token, (routing.weight * routing.kept)[:, None])
    clean = torch.stack([ours.experts.reference(int(e), row) for row, e in zip(x[0], routing.expert, strict=True)])
    assert_close(hidden[0], clean * weight, "ours: clean for the experts")
    with pytest.raises(AssertionError):
        assert_close(hidden, found)


def test_their_losses_of_one_layer_and_one_sequence() -> None:
    theirs, ours = pair()
    _, _, logits = theirs.router(tokens())
    routing = ours(tokens()).routing
    assert_close(routing.losses["load_balance"], load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1)))


def test_their_balance_loss_joins_layers_and_cuts_batches_into_sequences() -> None:
    """Layers are laid end to end before f * P: opposite imbalances of two layers cancel. And each sequence is apart."""
    model = SwitchTransformersForConditionalGeneration(config())
    one = 8.0 * torch.eye(E)[torch.zeros(S, dtype=torch.int64)][None]
    two = 8.0 * torch.eye(E)[torch.ones(S, dtype=torch.int64)][None]
    joined, index = model._unpack_router_logits((one, two))
    assert joined.shape == (1, 2 * S, E)
    theirs = load_balancing_loss_func(joined.softmax(-1), index)
    apart = [load_balance(layer[0].softmax(-1), layer[0].argmax(-1, keepdim=True)) for layer in (one, two)]
    assert float(theirs) == pytest.approx(E / 2, rel=0.01)
    assert float(sum(apart)) == pytest.approx(2 * E, rel=0.01)

    _, _, logits = pair()[0].router(tokens(2))
    flat, sequence = logits.detach().flatten(0, 1), torch.arange(2 * S) // S
    theirs = load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1)).detach()
    probs, expert = flat.softmax(-1), flat.argmax(-1, keepdim=True)
    assert_close(load_balance(probs, expert, sequence=sequence, scope="sequence"), theirs)
    assert abs(float(load_balance(probs, expert) - theirs)) > 1e-3


def test_their_losses_are_zero_where_every_layer_is_sparse() -> None:
    """With a sparse step of 1 auxiliary and z-loss are the number 0, whatever the routers did."""
    ids = torch.arange(10)[None] % 7 + 2
    for sparse, some in ((2, True), (4, False)):
        model = SwitchTransformersForConditionalGeneration(
            config(num_sparse_encoder_layers=sparse, num_sparse_decoder_layers=sparse)
        ).eval()
        with torch.no_grad():
            out = model(input_ids=ids, decoder_input_ids=ids, output_router_logits=True)
        assert len(out.encoder_router_logits) == sparse
        for value in (out.encoder_aux_loss, out.decoder_aux_loss, out.encoder_z_loss, out.decoder_z_loss):
            assert (float(value) > 0) == some


def test_their_z_loss_and_balance_count_padding() -> None:
    """Neither function takes a mask; ours leave padding out."""
    theirs, ours = pair()
    mask = torch.arange(S) < S // 2
    x = tokens().masked_fill(~mask[:, None], 0.0)
    _, _, logits = theirs.router(x)
    routing = ours(x, RoutingContext(mask=mask[None])).routing
    flat = logits[0]
    assert_close(router_z_loss_func(logits), (router_z(flat, mask) + torch.tensor(E).log() ** 2) / 2)
    assert_close(routing.losses["router_z"], router_z(flat[mask]))
    assert_close(routing.losses["load_balance"], load_balance(flat[mask].softmax(-1), flat[mask].argmax(-1)[:, None]))
    with pytest.raises(AssertionError):
        assert_close(routing.losses["load_balance"], load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1)))
