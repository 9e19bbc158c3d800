"""Hash routers: literal look-ups, what they demand of the context, checkpoints."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from moekit import routers
from moekit.experts import GroupedMLP, MultiHashMLP
from moekit.functional.hash_tables import balanced_table, hash_ids, random_table
from moekit.layer import AuxLosses, MoELayer
from moekit.routers import Bigram, HashRouter, NextToken, PreviousToken, TokenPosition
from moekit.routing import Capacity, RoutingContext
from moekit.testing import assert_close, some_mask
from moekit.transformer import DecoderOnly

V, D, E, T = 30, 6, 4, 40
GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(0, V, (T,), generator=GENERATOR)
CONTEXT = RoutingContext(
    mask=some_mask(T),
    token_ids=IDS,
    previous_ids=IDS.roll(1),
    next_ids=IDS.roll(-1),
    position=torch.arange(T) % 10,
)
COUNTS = torch.randint(0, 50, (V,), generator=GENERATOR)
EMBEDDINGS = torch.randn(V, 5, generator=GENERATOR)
X = torch.randn(T, D, generator=GENERATOR)

PRESETS = {
    "hash_layers": (lambda: routers.hash_layers(E, COUNTS), "token_ids"),
    "hash_random": (lambda: routers.hash_random(E, V, seed=2), "token_ids"),
    "hash_previous": (lambda: routers.hash_previous(E, COUNTS), "previous_ids"),
    "hash_position": (lambda: routers.hash_position(E, 12), "position"),
    "hash_clustered": (lambda: routers.hash_clustered(E, EMBEDDINGS), "token_ids"),
    "hash_dispersed": (lambda: routers.hash_dispersed(E, EMBEDDINGS), "token_ids"),
    "hash_oracle": (lambda: routers.hash_oracle(E, COUNTS), "next_ids"),
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("training", [True, False])
def test_look_up(name: str, training: bool) -> None:
    """Each real token goes where the table says for its key, with weight exactly 1; hidden states do not matter."""
    make, field = PRESETS[name]
    router = make().train(training)
    routing = router(X, CONTEXT)
    key = getattr(CONTEXT, field)
    assert routing.token.tolist() == list(range(T))
    assert routing.expert[CONTEXT.mask].tolist() == [int(router.table[0, k]) for k in key[CONTEXT.mask]]
    assert routing.kept.tolist() == CONTEXT.mask.tolist()
    assert bool((routing.weight == 1).all())
    assert routing.losses == {}
    assert not list(router.parameters())
    assert torch.equal(router(-X, CONTEXT).expert, routing.expert)


def test_bigrams() -> None:
    router = routers.hash_bigram(E, Bigram(V, buckets=97, seed=1), seed=5)
    expert = router(X, CONTEXT).expert
    for t in range(T):
        if CONTEXT.mask[t]:
            bucket = int(hash_ids(IDS.roll(1)[t], IDS[t], seed=1)) % 97
            assert int(expert[t]) == int(router.table[0, bucket])
    assert router.num_experts == E
    # The order of the pair counts, and a balanced table is made of counts of buckets.
    key = Bigram(V)
    assert not torch.equal(key.bucket(IDS, IDS.roll(1)), key.bucket(IDS.roll(1), IDS))
    counts = torch.arange(97)
    balanced = routers.hash_bigram(E, Bigram(V, buckets=97), counts=counts)
    assert torch.equal(balanced.table[0], balanced_table(counts, E))


def literal_multi_hash(x: Tensor, ids: Tensor, tables: Tensor, bank: MultiHashMLP) -> Tensor:
    """v = relu([A_k1 h, ..., A_kN h]), out = [B_k1, ..., B_kN] v, for one token after the other."""
    segments, experts = tables.shape[0], bank.num_experts // tables.shape[0]
    out = []
    for h, token in zip(x, ids.tolist(), strict=True):
        chosen = [m * experts + int(tables[m, token]) for m in range(segments)]
        v = torch.cat([h @ bank.w_in[n] for n in chosen]).relu()
        out.append(v @ torch.cat([bank.w_out[n] for n in chosen]))
    return torch.stack(out)


def test_multi_hash_is_one_feed_forward_in_segments() -> None:
    router = routers.multi_hash(E, COUNTS, num_tables=3)
    bank = MultiHashMLP(E, D, 12, num_segments=3, init_scale=1.0)
    layer = MoELayer(router, bank).double()
    x = X.double().requires_grad_()
    hidden, routing = layer(x, RoutingContext(token_ids=IDS))
    assert routing.num_experts == 3 * E
    assert len({tuple(t) for t in router.table.tolist()}) == 3
    expected = literal_multi_hash(x, IDS, router.table, bank)
    assert_close(hidden, expected)
    probe = torch.cos(torch.arange(hidden.numel(), dtype=torch.float64)).view_as(hidden)
    leaves = [x, bank.w_in, bank.w_out]
    ours, theirs = (torch.autograd.grad((y * probe).sum(), leaves) for y in (hidden, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_capacity() -> None:
    """With a capacity the routing is served in token order and padded dispatch gives what packed does."""
    table = torch.zeros(V, dtype=torch.int64)
    router = HashRouter(E, table, capacity=Capacity(train=1.0, minimum=1)).train()
    routing = router(X, RoutingContext(token_ids=IDS))
    assert routing.capacity == T // E
    assert routing.kept.tolist() == [True] * (T // E) + [False] * (T - T // E)
    assert router.eval()(X, RoutingContext(token_ids=IDS)).capacity is None
    with pytest.raises(ValueError, match="cannot serve tokens by probability"):
        HashRouter(E, table, capacity=Capacity(train=1.0, priority="probability"))


@pytest.mark.parametrize("name", PRESETS)
def test_what_it_demands_of_the_context(name: str) -> None:
    make, field = PRESETS[name]
    router = make()
    with pytest.raises(ValueError, match=rf"needs RoutingContext.{field}: got None"):
        router(X)
    limit = router.key.num_keys
    for wrong in (limit, -1):
        ids = getattr(CONTEXT, field).clone()
        place = int(CONTEXT.mask.nonzero()[3])
        ids[place] = wrong
        with pytest.raises(ValueError, match=rf"{field} must be in 0..{limit - 1} for this hash: got {wrong}"):
            router(X, RoutingContext(**{field: ids}))
        ids = getattr(CONTEXT, field).clone()
        ids[~CONTEXT.mask] = wrong  # padding may hold anything
        assert torch.equal(
            router(X, RoutingContext(mask=CONTEXT.mask, **{field: ids})).expert[CONTEXT.mask],
            router(X, CONTEXT).expert[CONTEXT.mask],
        )


def test_tables_must_fit() -> None:
    with pytest.raises(ValueError, match=r"Int64\[num_keys\] or Int64\[K, num_keys\]: got torch.float32"):
        HashRouter(E, torch.zeros(V))
    with pytest.raises(ValueError, match="30 entries for the 12 keys"):
        HashRouter(E, torch.zeros(V, dtype=torch.int64), key=TokenPosition(12))
    with pytest.raises(ValueError, match=r"experts in 0\.\.3: got 4"):
        HashRouter(E, torch.full((V,), 4))
    with pytest.raises(ValueError, match="got -1"):
        HashRouter(E, torch.full((V,), -1))
    with pytest.raises(ValueError, match="meta"):
        HashRouter(E, torch.zeros(V, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="at least one table"):
        routers.multi_hash(E, COUNTS, num_tables=0)


def test_table_is_in_the_checkpoint_and_moves_with_the_module() -> None:
    """Saved and loaded into a router made with another seed, the table is the saved one, bit for bit."""
    saved, other = (routers.hash_random(E, V, seed=seed) for seed in (0, 1))
    expected = saved.table.clone()
    assert not torch.equal(other.table, expected)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.table, expected)
    assert other.bfloat16().table.dtype == torch.int64
    assert other.to("meta").table.is_meta


def test_oracle_is_refused_in_a_decoder_unless_wanted() -> None:
    def model(router: HashRouter, ids: Tensor) -> Tensor:
        def sparse(layer: int, side: str) -> MoELayer:
            return MoELayer(router, GroupedMLP(E, D, 8))

        return DecoderOnly(V, D, 2, layers=1, hidden_dim=8, feed_forward=sparse).decode(ids).routings[0].expert

    ids = IDS.view(4, 10)
    with pytest.raises(ValueError, match="depend on later tokens"):
        model(routers.hash_oracle(E, COUNTS), ids)
    oracle = routers.hash_oracle(E, COUNTS, allow_future=True)
    after = torch.cat([ids[:, 1:], torch.zeros(4, 1, dtype=torch.int64)], 1)
    assert torch.equal(model(oracle, ids), oracle.table[0][after.flatten()])
    before = routers.hash_previous(E, COUNTS)
    shifted = torch.cat([torch.zeros(4, 1, dtype=torch.int64), ids[:, :-1]], 1)
    assert torch.equal(model(before, ids), before.table[0][shifted.flatten()])
    position = routers.hash_position(E, 10)
    assert torch.equal(model(position, ids), position.table[0].repeat(4))
    assert NextToken.looks_ahead
    assert not PreviousToken.looks_ahead


def test_no_loss_to_weigh() -> None:
    routing = routers.hash_random(E, V)(X, CONTEXT)
    with pytest.raises(ValueError, match="no router returned a loss"):
        AuxLosses(load_balance=1.0)(routing)


def test_compiles_with_a_capacity() -> None:
    router = HashRouter(E, random_table(V, E), capacity=Capacity(train=2.0))
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, CONTEXT).expert, router(X, CONTEXT).expert)
    torch._dynamo.reset()
