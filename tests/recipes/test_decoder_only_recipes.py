"""What the decoder-only recipes build: tables from the run's own text, phases, pyramids, places of layers, settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from moekit.cli.recipes import main
from moekit.component import components
from moekit.data.counts import bigram_counts, token_counts
from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.experts import BASELayerStack, GroupedMLP, MultiHashMLP
from moekit.layer import MoELayer
from moekit.mixing import SoftmaxMix
from moekit.planner.census import parameters
from moekit.recipes import base_layers, deepspeed_moe, dense_to_sparse, hash_layers, moe_lm, shazeer
from moekit.recipes._routers import LEARNED, Learned
from moekit.recipes.hash_layers import Hash, ModelConfig, hash_router
from moekit.recurrent import RecurrentLayer
from moekit.routers import (
    AllChoices,
    Bigram,
    DenseToSparseRouter,
    ExponentialDecay,
    HashRouter,
    HierarchicalRouter,
    LinearDecay,
    NoisyTopKRouter,
    SampledSoftmax,
    TopKRouter,
)
from moekit.routing import RoutingContext
from moekit.runs import RunText
from moekit.runs.module import make_module

KINDS: tuple[Hash, ...] = get_args(Hash)


def small(config: Any, cache: Path | str = "unused", **model: Any) -> Any:
    """A recipe's configuration with a very small network, text and budget."""
    data = replace(config.data, vocab_size=500, babel_languages=2, babel_sentences=800, max_length=64, cache=str(cache))
    sizes = {"dim": 16, "hidden_dim": 32, "num_experts": 4, **model}
    if hasattr(config.model, "heads"):
        sizes["heads"] = 2
    train = replace(config.train, max_steps=20, accelerator="cpu")
    return replace(config, data=data, model=replace(config.model, **sizes), train=train)


def sparse(network: nn.Module) -> list[tuple[int, MoELayer]]:
    """The layers of experts, with the numbers of their blocks."""
    made = [(i, getattr(block, "feed_forward", None)) for i, block in enumerate(network.decoder.blocks)]  # type: ignore[union-attr,arg-type]
    return [(i, layer) for i, layer in made if isinstance(layer, MoELayer)]


def move(network: nn.Module, step: int) -> None:
    """What a Trainer does after optimizer step number `step`."""
    for component in components(network).values():
        component.on_step_end(step)


# -- hash_layers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache: Path) -> MultitaskData:
    return small(hash_layers.TINY, cache).batches()


def loads(router: HashRouter, counts: Tensor) -> Tensor:
    """How often each expert of each table is asked for, relative to an even share."""
    load = torch.zeros(router.num_tables, router.experts_per_table, dtype=torch.float64)
    load.scatter_add_(1, router.table, counts.double().expand_as(router.table))
    return load / load.mean(1, keepdim=True)


def table(kind: Hash, **settings: Any) -> ModelConfig:
    return ModelConfig(hash=kind, dim=16, num_experts=4, **settings)


def test_balanced_table_is_even_on_the_runs_own_text(data: MultitaskData) -> None:
    """On what the decoder reads: bos and all tokens but eos. A table that knows no counts is not even."""
    vocab, bos = data.tokenizer.vocab_size, data.tokenizer.bos_id
    counts = token_counts(data.store, vocab, before=bos)
    assert counts.max() < counts.sum() / 4, "one token alone is more than an even share"
    text = RunText(vocab, data)
    assert loads(hash_router(table("balanced"), text), counts).max() < 1.01
    assert loads(hash_router(table("balanced", tables=2), text), counts).max() < 1.01
    assert loads(hash_router(table("balanced"), RunText(vocab)), counts).max() > 1.01
    assert loads(hash_router(table("random"), text), counts).max() > 1.01
    pairs = bigram_counts(data.store, Bigram(vocab), before=bos)
    assert loads(hash_router(table("bigram"), text), pairs).max() < 1.01


def test_the_pipeline_hands_the_text_over(data: MultitaskData, cache: Path) -> None:
    """What `run` trains has the table of the text; a build without text has another."""
    config = small(hash_layers.TINY, cache)
    module, _ = make_module(hash_layers.RECIPE, config, data)
    vocab = data.tokenizer.vocab_size
    [(place, layer)] = sparse(module.backbone)
    assert place == 2
    assert torch.equal(layer.router.table, hash_router(table("balanced"), RunText(vocab, data)).table)  # type: ignore[arg-type]
    [(_, other)] = sparse(hash_layers.build(config, RunText(vocab)).backbone)
    assert not torch.equal(layer.router.table, other.router.table)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_routes_a_batch(
    kind: Hash, data: MultitaskData, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = data.tokenizer.vocab_size
    vectors = torch.randn(vocab, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("moekit.recipes.hash_layers.token_embeddings", lambda run, size: vectors)
    config = small(hash_layers.TINY, cache, hash=kind)
    config = replace(config, evaluate=replace(config.evaluate, samples=0))
    built = hash_layers.build(config, RunText(vocab, data))
    assert built.aux is None
    ids = torch.randint(0, vocab, (2, 9), generator=torch.Generator().manual_seed(1))
    routing = built.backbone.decode(ids).routings[0]  # type: ignore[operator]
    [(_, layer)] = sparse(built.backbone)
    key = layer.router.key(  # type: ignore[operator]
        RoutingContext(
            token_ids=ids.flatten(),
            previous_ids=torch.cat((torch.zeros(2, 1, dtype=torch.int64), ids[:, :-1]), 1).flatten(),
            next_ids=torch.cat((ids[:, 1:], torch.zeros(2, 1, dtype=torch.int64)), 1).flatten(),
            position=torch.arange(9).repeat(2),
        )
    )
    assert torch.equal(routing.expert, layer.router.table[0, key])  # type: ignore[index]


@pytest.mark.parametrize("name", LEARNED)
def test_learned_routers_stand_in_for_the_table(name: Learned) -> None:
    """One expert for a token, nothing dropped, whoever chooses; all else is the recipe's."""
    model: dict[str, Any] = {"router": name}
    built = hash_layers.build(small(hash_layers.TINY, **model), RunText(500))
    [(place, layer)] = sparse(built.backbone)
    routing = built.backbone.decode(torch.arange(64).view(2, 32)).routings[0]  # type: ignore[operator]
    assert place == 2
    assert routing.token.tolist() == list(range(64))
    assert bool(routing.kept.all())
    assert type(layer.router) is type(LEARNED[name](8, 4))
    assert isinstance(getattr(layer.router, "exploration", None), SampledSoftmax) == (name == "sampled")


def test_multi_hash_counts_active_parameters_by_segment() -> None:
    network = hash_layers.build(small(hash_layers.TINY, tables=4), RunText(500)).backbone
    [(_, layer)] = sparse(network)
    assert isinstance(layer.experts, MultiHashMLP)
    single = hash_layers.build(small(hash_layers.TINY), RunText(500)).backbone
    assert parameters(network) == parameters(single)


def test_bad_tables(tmp_path: Path, data: MultitaskData, cache: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.samples"):
        hash_layers.build(small(hash_layers.TINY, hash="oracle"), RunText(500))
    with pytest.raises(UserError, match=r"model\.tables"):
        hash_layers.build(small(hash_layers.TINY, hash="random", tables=2), RunText(500))
    with pytest.raises(UserError, match=r"model\.router base has no table: leave model\.hash"):
        hash_layers.build(small(hash_layers.TINY, router="base", hash="random"), RunText(500))
    with pytest.raises(UserError, match=r"model\.embeddings"):
        hash_layers.build(small(hash_layers.TINY, hash="clustered"), RunText(500, data))
    with pytest.raises(UserError):
        hash_layers.build(small(hash_layers.TINY, hash="clustered", embeddings=str(tmp_path)), RunText(500, data))


def test_clusters_of_a_trained_run(tmp_path: Path, data: MultitaskData, cache: Path) -> None:
    """Tables from the embeddings in a run folder, which must have the vocabulary."""
    out = str(tmp_path / "dense")
    options = [
        "--data.cache", str(cache), "--data.vocab_size", "500", "--data.babel_languages", "2",
        "--data.babel_sentences", "800", "--data.max_length", "64", "--model.dim", "16", "--model.heads", "2",
        "--model.hidden_dim", "32", "--tasks.causal_lm.tokens", "128", "--train.max_steps", "2",
        "--train.validate_every", "0", "--train.warmup_steps", "1", "--train.accelerator", "cpu",
    ]  # fmt: skip
    assert main(hash_layers.RECIPE, ["fit", "--variant", "tiny_dense", *options, "--out", out]) == 0
    for kind in ("clustered", "dispersed"):
        config = small(hash_layers.TINY, cache, hash=kind, embeddings=out)
        [(_, layer)] = sparse(hash_layers.build(config, RunText(500, data)).backbone)
        assert set(layer.router.table.flatten().tolist()) == {0, 1, 2, 3}  # type: ignore[union-attr,operator]
        with pytest.raises(UserError, match="vocabulary of 400"):
            hash_layers.build(config, RunText(400, data))
        # To be loaded from a checkpoint, it needs no other run.
        [(_, empty)] = sparse(
            hash_layers.build(replace(config, model=replace(config.model, embeddings="gone")), RunText(500)).backbone
        )
        assert empty.router.table.shape == layer.router.table.shape  # type: ignore[union-attr]


# -- dense_to_sparse -----------------------------------------------------------------------------------------------


def test_phases_follow_one_another() -> None:
    """Of 20 steps: two as one expert, eight while the temperature falls from 2.0 to 0.3, then one expert per token."""
    config = small(dense_to_sparse.TINY)
    network = dense_to_sparse.build(config, RunText(500)).backbone.train()
    ids = torch.randint(0, 500, (4, 16), generator=torch.Generator().manual_seed(0))
    seen = []
    for step in range(13):
        output = network.decode(ids)  # type: ignore[operator]
        layers = [layer for _, layer in sparse(network)]
        routers = [layer.router for layer in layers]
        assert all(isinstance(router, DenseToSparseRouter) for router in routers)
        active = [routing.kept.sum().item() / ids.numel() for routing in output.routings]
        temperature = float(routers[0].temperature(routers[0].step))  # type: ignore[operator]
        seen.append((layers[0].phase.active, temperature, active[0]))  # type: ignore[union-attr]
        move(network, step + 1)
    tied, temperatures, active = zip(*seen, strict=True)
    assert tied == (True,) * 2 + (False,) * 11
    assert temperatures[2] == pytest.approx(2.0)
    assert temperatures[6] == pytest.approx(2.0 * (0.3 / 2.0) ** 0.5)
    assert temperatures[10:] == pytest.approx((0.3,) * 3)
    assert active[:2] == (1, 1)
    assert active[2] > 3.5  # of four
    assert active[9] > 1.2
    assert active[10:] == (1, 1, 1)
    first, second = (layer.experts for _, layer in sparse(network))
    assert not torch.equal(first.w_in[0], first.w_in[1])  # type: ignore[index]
    masks = [(bank.w_in == 0) for bank in (first, second)]  # type: ignore[union-attr]
    assert 0.05 < masks[0].float().mean() < 0.15
    assert not torch.equal(masks[0], masks[1]), "every layer has a perturbation of its own"


def test_switch_stands_beside_the_gate() -> None:
    """In the same network, from the first step: one expert for a token, the most probable one, in training too."""
    built = dense_to_sparse.build(small(dense_to_sparse.TINY, evolve=False, load_balance=0.01), RunText(500))
    network = built.backbone.train()
    output = network.decode(torch.arange(64).view(2, 32))  # type: ignore[operator]
    for (_, layer), routing in zip(sparse(network), output.routings, strict=True):
        assert layer.phase is None
        assert isinstance(layer.router, TopKRouter)
        assert layer.router.exploration is None
        assert routing.token.tolist() == list(range(64))
    assert built.aux is not None
    evolving = dense_to_sparse.build(small(dense_to_sparse.TINY), RunText(500)).backbone
    assert parameters(network)["total"] == parameters(evolving)["total"]


def test_phases_are_shares_of_the_steps() -> None:
    config = small(dense_to_sparse.TINY)
    assert dense_to_sparse.phases(config) == (2, 8)
    longer = replace(config, train=replace(config.train, max_steps=200))
    assert dense_to_sparse.phases(longer) == (20, 80)
    linear = replace(config, model=replace(config.model, decay="linear"))
    [(_, layer), _] = sparse(dense_to_sparse.build(linear, RunText(500)).backbone)
    assert layer.router.temperature == LinearDecay(2.0, 0.3, 8, begin=2)
    with pytest.raises(UserError, match=r"train\.max_steps"):
        dense_to_sparse.build(replace(config, train=replace(config.train, max_steps=0)), RunText(500))
    with pytest.raises(UserError, match=r"model\.sparsify"):
        dense_to_sparse.build(replace(config, model=replace(config.model, sparsify=0.95)), RunText(500))


@pytest.mark.parametrize("decay", [ExponentialDecay, LinearDecay])
def test_a_schedule_may_begin_later(decay: type[ExponentialDecay | LinearDecay]) -> None:
    now, later = decay(2.0, 0.5, 10), decay(2.0, 0.5, 10, begin=7)
    for step in range(25):
        assert later(torch.tensor(step)) == now(torch.tensor(max(0, step - 7)))
    with pytest.raises(ValueError, match="begin=-1"):
        decay(2.0, 0.5, 10, begin=-1)


# -- base_layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "every", "places"), [(4, 2, [1]), (4, 1, [0, 1, 2]), (24, 6, [5, 11, 17])])
def test_base_layers_stand_between_blocks(layers: int, every: int, places: list[int]) -> None:
    """After so many blocks and not after the last: floor(i L / (N + 1)) for N layers."""
    config = small(base_layers.TINY, layers=layers, every=every, sublayers=2)
    network = base_layers.build(config, RunText(500)).backbone
    assert [place for place, _ in sparse(network)] == places
    for place in places:
        block = network.decoder.blocks[place]  # type: ignore[union-attr,index]
        assert block.extra is not None
        assert block.extra_order == "before"  # the block's own feed-forward comes first
    bank = sparse(network)[0][1].experts
    assert isinstance(bank, BASELayerStack)
    assert bank.num_layers == 2


def test_base_layers_balance_in_training_and_begin_as_the_identity() -> None:
    network = base_layers.build(small(base_layers.TINY), RunText(500)).backbone
    ids = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    routing = network.train().decode(ids).routings[0]  # type: ignore[operator]
    assert torch.bincount(routing.expert, minlength=4).tolist() == [8, 8, 8, 8]
    before = network.eval().decode(ids).hidden  # type: ignore[operator]
    with torch.no_grad():
        sparse(network)[0][1].experts.w_in.normal_()  # type: ignore[union-attr,operator]
    torch.testing.assert_close(network.decode(ids).hidden, before)  # type: ignore[operator]
    with pytest.raises(UserError, match="gate"):
        base_layers.build(small(base_layers.TINY, gated=True), RunText(500))


# -- deepspeed_moe -------------------------------------------------------------------------------------------------


def test_pyramid_and_residual() -> None:
    network = deepspeed_moe.build(small(deepspeed_moe.TINY, layers=6, doubled=2), RunText(500)).backbone
    assert [(i, layer.num_experts) for i, layer in sparse(network)] == [(1, 4), (3, 8), (5, 8)]
    assert all(layer.shared is not None and layer.mix is None for _, layer in sparse(network))
    plain = deepspeed_moe.build(small(deepspeed_moe.RECIPE.variants["tiny_moe"].config), RunText(500)).backbone
    assert [(layer.num_experts, layer.shared) for _, layer in sparse(plain)] == [(4, None), (4, None)]


def test_as_in_the_released_code() -> None:
    config = small(deepspeed_moe.TINY, residual="softmax", expert_init="copied")
    for _, layer in sparse(deepspeed_moe.build(config, RunText(500)).backbone):
        assert isinstance(layer.mix, SoftmaxMix)
        assert isinstance(layer.experts, GroupedMLP)
        assert all(torch.equal(w, layer.experts.w_in[0]) for w in layer.experts.w_in)
    for _, layer in sparse(deepspeed_moe.build(small(deepspeed_moe.TINY), RunText(500)).backbone):
        assert not torch.equal(layer.experts.w_in[0], layer.experts.w_in[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("variant", "experts"),
    [("paper_350m_pr_moe", [32] * 10 + [64] * 2), ("paper_1b3_pr_moe", [64] * 10 + [128] * 2),
     ("paper_1b3_mos", [64] * 8 + [128] * 2)],
)  # fmt: skip
def test_published_pyramids(variant: str, experts: list[int]) -> None:
    with torch.device("meta"):
        network = deepspeed_moe.build(deepspeed_moe.RECIPE.variants[variant].config, RunText(1000)).backbone
    assert [layer.num_experts for _, layer in sparse(network)] == experts


# -- shazeer and moe_lm --------------------------------------------------------------------------------------------


def test_gates_of_shazeer() -> None:
    [(_, flat)] = sparse(shazeer.build(small(shazeer.TINY, num_experts=8), RunText(500)).backbone)
    assert isinstance(flat.router, NoisyTopKRouter)
    assert flat.router.k == 4
    two = shazeer.build(small(shazeer.TINY, num_experts=12, groups=3, k=2), RunText(500))
    [(_, levels)] = sparse(two.backbone)
    assert isinstance(levels.router, HierarchicalRouter)
    counted = parameters(two.backbone)
    assert counted["total"] - counted["active"] == 8 * 2 * 16 * 32  # a token passes four of twelve
    with pytest.raises(UserError, match=r"model\.groups"):
        shazeer.build(small(shazeer.TINY, num_experts=12, groups=5, k=2), RunText(500))


@pytest.mark.parametrize(("hidden", "count"), [(32, 4), (48, 5)])
def test_further_lstms_of_shazeer_cost_what_its_experts_do(hidden: int, count: int) -> None:
    """The paper's 4xLSTM-512: two more LSTMs in the place of four experts twice as wide as the model."""
    sizes: dict[str, Any] = {"baseline": "lstm", "hidden_dim": hidden}
    lstms = shazeer.build(small(shazeer.TINY, num_experts=0, **sizes), RunText(500)).backbone
    layers = lstms.decoder.layers  # type: ignore[union-attr]
    assert [type(layer) for layer in layers] == [RecurrentLayer] * count  # type: ignore[union-attr]
    each = sum(p.numel() for name, p in layers[0].named_parameters() if "weight" in name)  # type: ignore[index]
    assert each * (count - 2) == 2 * 16 * 4 * hidden, "products of four experts"
    with pytest.raises(UserError, match=r"model\.baseline lstm needs experts of at least the operations"):
        shazeer.build(small(shazeer.TINY, num_experts=0, baseline="lstm", hidden_dim=8), RunText(500))


@pytest.mark.parametrize(
    ("weights", "left"), [((0.1, 0.1), {"importance", "load"}), ((0.2, 0.0), {"importance"}), ((0.0, 0.0), None)]
)
def test_balance_losses_of_shazeer_can_be_left_out(weights: tuple[float, float], left: set[str] | None) -> None:
    importance, load = weights
    aux = shazeer.build(small(shazeer.TINY, importance=importance, load=load), RunText(500)).aux
    assert (aux and set(aux.weights)) == left


def test_router_of_moe_lm_is_fairseqs() -> None:
    """Top-2, both always sent, weights sharing what survives, 2 ceil(S / E) slots, balance 0.01 summed over layers."""
    built = moe_lm.build(small(moe_lm.TINY), RunText(500))
    assert [place for place, _ in sparse(built.backbone)] == [1, 3]
    for _, layer in sparse(built.backbone):
        router = layer.router
        assert isinstance(router, TopKRouter)
        assert (router.k, router.renormalise) == (2, "after_drop")
        assert isinstance(router.second_expert, AllChoices)
        assert (router.balance.count, router.balance.when) == ("first", "before_drop")
        assert router.capacity.slots(64, 4, 2, training=True) == 2 * 16
        assert router.capacity.slots(64, 4, 2, training=False) is None
    assert built.aux is not None
    assert (dict(built.aux.weights), built.aux.layers) == ({"load_balance": 0.01}, "sum")


def test_a_shared_branch_of_moe_lm_costs_what_an_expert_does() -> None:
    one, shared = (
        moe_lm.build(small(moe_lm.TINY, **model), RunText(500)).backbone
        for model in ({"k": 2, "num_experts": 4}, {"k": 1, "num_experts": 3, "shared": True, "balance_scope": "global"})
    )
    difference = sum(p.numel() for p in one.parameters()) - sum(p.numel() for p in shared.parameters())
    dim = one.embedding.weight.shape[1]  # type: ignore[union-attr,index]
    # A router's row, and what biases of experts and of dense layers differ by.
    assert 0 <= difference <= 2 * 4 * dim
    for _, layer in sparse(shared):
        assert layer.shared is not None
        assert layer.router.balance.scope == "global"  # type: ignore[union-attr]
    dense = moe_lm.build(small(moe_lm.TINY, k=1, num_experts=0, shared=True), RunText(500)).backbone
    wide = moe_lm.build(small(moe_lm.TINY, k=2, num_experts=0), RunText(500)).backbone
    assert parameters(dense) == parameters(wide)


def test_published_runs_see_as_many_tokens() -> None:
    """300 B tokens, whatever the tokens of a step."""
    for module, prefix in ((moe_lm, "paper"), (deepspeed_moe, "paper")):
        for name, variant in module.RECIPE.variants.items():
            config = variant.config
            if name.startswith(prefix):
                assert config.train.max_steps * config.tasks.causal_lm.tokens == pytest.approx(300e9, rel=1e-4)
