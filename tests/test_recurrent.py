"""The recurrent language model: its equations, its cache, and the interface that it shares with `DecoderOnly`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.experts import GroupedMLP
from moekit.heads import CausalLMHead
from moekit.inference.generate import complete
from moekit.inference.translator import search_for
from moekit.layer import MoELayer
from moekit.recurrent import RecurrentLayer, RecurrentLM
from moekit.routers import ExpertChoiceRouter, HierarchicalRouter, noisy_topk
from moekit.routing import Router
from moekit.transformer import MLP, materialize, routed_layers

DIM, VOCAB = 16, 50
PROJECTED = pytest.mark.filterwarnings("ignore:LSTM with projections")


def lively(router: Router) -> Router:
    """The same router with weights that choose: those of a noisy gate begin at zero."""
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def sparse(router: Router | None = None) -> MoELayer:
    router = lively(noisy_topk(DIM, 8)) if router is None else router
    return MoELayer(router, GroupedMLP(router.num_experts, DIM, 32, init_scale=1.0))


def model(feed_forward: nn.Module | None = None, **options: object) -> RecurrentLM:
    torch.manual_seed(0)
    return RecurrentLM(VOCAB, DIM, feed_forward or sparse(), **options)  # type: ignore[arg-type]


def tokens(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def test_equations_written_out() -> None:
    """Embedding, LSTM, sigmoid of the experts, LSTM, softmax, each but the first and the last with a residual."""
    lm = model().eval()
    ids = tokens()
    below, between, above = lm.decoder.layers

    def lstm(layer: nn.Module, x: Tensor) -> Tensor:
        p = dict(layer.lstm.named_parameters())  # type: ignore[union-attr]
        h = c = torch.zeros(x.shape[0], DIM)
        out = []
        for t in range(x.shape[1]):
            both = x[:, t] @ p["weight_ih_l0"].t() + p["bias_ih_l0"] + h @ p["weight_hh_l0"].t() + p["bias_hh_l0"]
            i, f, g, o = both.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out, dim=1)

    x = lm.embedding(ids)
    x = x + lstm(below, x)
    x = x + between.feed_forward(x).hidden.sigmoid()  # type: ignore[union-attr,operator]
    x = x + lstm(above, x)
    torch.testing.assert_close(lm.decode(ids).hidden, x)
    torch.testing.assert_close(lm.logits(x), F.linear(x, lm.output.weight))  # type: ignore[union-attr]


@PROJECTED
@pytest.mark.parametrize("units", [None, 24])
@pytest.mark.parametrize("router", ["flat", "hierarchical"])
def test_cached_decoding_equals_uncached(units: int | None, router: str) -> None:
    chosen = lively(HierarchicalRouter(DIM, 3, 4)) if router == "hierarchical" else None
    lm, ids = model(sparse(chosen), units=units).eval(), tokens()
    whole = lm.decode(ids).hidden
    cache = lm.new_cache()
    pieces = [lm.decode(part, cache=cache).hidden for part in ids.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert cache.length == ids.shape[1]


def test_rows_of_a_cache_can_be_reordered() -> None:
    lm, ids, rows = model().eval(), tokens(), torch.tensor([2, 0, 0])
    cache = lm.new_cache()
    lm.decode(ids[:, :5], cache=cache)
    cache.reorder(rows)
    rest = lm.decode(ids[rows, 5:], cache=cache).hidden
    torch.testing.assert_close(rest, lm.decode(ids[rows]).hidden[:, 5:])
    assert not torch.allclose(rest, lm.decode(ids).hidden[:, 5:])


@pytest.mark.parametrize("beam_size", [1, 3])
def test_searches_write_the_same_with_and_without_cache(beam_size: int) -> None:
    lm, search = model(), search_for(beam_size, 0.6)
    found = [complete(lm, tokens(), search=search, max_new_tokens=6, use_cache=use) for use in (True, False)]
    assert torch.equal(found[0].ids, found[1].ids)
    assert found[0].ids.numel()


def test_later_tokens_and_padding_change_nothing_before_them() -> None:
    lm, ids = model().eval(), tokens(2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:] = False
    other = ids.clone()
    other[0, 6:] = 4
    other[1, 5:] = 0
    one, two = lm.decode(ids, mask), lm.decode(other, mask)
    torch.testing.assert_close(one.hidden[0, :6], two.hidden[0, :6])
    torch.testing.assert_close(one.hidden[1, :5], two.hidden[1, :5])
    assert not torch.allclose(one.hidden[0, 6:], two.hidden[0, 6:])
    routing = one.routings[0]
    assert torch.equal(routing.kept, mask.flatten()[routing.token])


def test_sparse_layers_are_found_and_trained() -> None:
    lm = model()
    assert lm.routed_layers == ("decoder.1",)
    assert routed_layers(lm) == {"decoder.1": lm.decoder.blocks[1].feed_forward}
    assert model(MLP(DIM, 64)).routed_layers == ()
    output = lm.decode(tokens())
    (lm.logits(output.hidden).logsumexp(-1).mean() + output.routings[0].losses["load"]).backward()
    assert all(p.grad is not None for p in lm.parameters())
    assert CausalLMHead(lm).backbone is lm


def test_dropout_acts_in_training_on_every_layer() -> None:
    lm, ids = model(MLP(DIM, 64), dropout=0.5), tokens()
    lm.train()
    assert not torch.equal(lm.decode(ids).hidden, lm.decode(ids).hidden)
    lm.eval()
    assert torch.equal(lm.decode(ids).hidden, lm.decode(ids).hidden)
    for layer in lm.decoder.layers:  # a residual with everything dropped is the residual
        layer.dropout = 1.0
    lm.train()
    lm.decoder.dropout = 0.0
    torch.testing.assert_close(lm.decode(ids).hidden, lm.embedding(ids))


def test_dense_feed_forward_begins_as_an_expert_does() -> None:
    """Truncated normal of variance 1 / fan-in, from the constructor and after the meta device."""
    with torch.device("meta"):
        lm = RecurrentLM(VOCAB, 64, MLP(64, 256))
    materialize(lm, "cpu")
    for made in (lm, RecurrentLM(VOCAB, 64, MLP(64, 256))):
        weights = made.decoder.layers[1].feed_forward  # type: ignore[union-attr]
        for matrix in (weights.w_in.weight, weights.w_out.weight):  # type: ignore[union-attr]
            # 0.88 is the deviation of a standard normal cut at two.
            assert matrix.std().item() == pytest.approx(0.88 * matrix.shape[1] ** -0.5, rel=0.05)
        assert torch.isfinite(made.decode(tokens()).hidden).all()


@pytest.mark.parametrize(("count", "place"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_how_many_lstms_there_are(count: int, place: int) -> None:
    """Half of them, or one more, below the feed-forward; and LSTMs alone, which write and remember as others do."""
    kinds = [isinstance(layer, RecurrentLayer) for layer in model(MLP(DIM, 32), lstms=count).decoder.layers]
    assert kinds == [n != place for n in range(count + 1)]
    torch.manual_seed(0)
    alone = RecurrentLM(VOCAB, DIM, None, lstms=count).eval()
    assert [type(layer) for layer in alone.decoder.layers] == [RecurrentLayer] * count
    assert alone.routed_layers == ()
    ids = tokens()
    cache = alone.new_cache()
    cut = [alone.decode(ids[:, :4], cache=cache).hidden, alone.decode(ids[:, 4:], cache=cache).hidden]
    torch.testing.assert_close(torch.cat(cut, dim=1), alone.decode(ids).hidden)


def test_bad_use() -> None:
    with pytest.raises(ValueError, match="allow_future"):
        model(sparse(ExpertChoiceRouter(DIM, 4)))
    with pytest.raises(ValueError, match="units=8"):
        RecurrentLayer(DIM, 8)
    with pytest.raises(ValueError, match="right"):
        model().decode(tokens(1, 3), torch.tensor([[False, True, True]]))
