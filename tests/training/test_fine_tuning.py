"""Fine-tuning: what is chosen trains and nothing else moves, settings reach the layers, optimizer state goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import moekit as mk
from moekit.data.batch import Batch
from moekit.experts import Experts
from moekit.heads import CausalLMHead
from moekit.routers.dense_to_sparse import ExponentialDecay, dense_to_sparse
from moekit.routers.loss_free import loss_free
from moekit.surgery.adapters import add_adapters
from moekit.testing.pretended_gpu import pretended_gpu
from moekit.training.fine_tuning import (
    ADAPTERS,
    ALL,
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    MOE,
    NON_MOE,
    ROUTERS,
    SUBSETS,
    set_expert_dropout,
    set_train_capacity,
    subset,
    train_only,
    with_slots,
)
from moekit.training.multitask import MultitaskModule
from moekit.training.optimizers import adamw
from moekit.transformer import MLP, DecoderOnly, every_other

D, VOCAB = 8, 30


def sparse(layer: int, side: str) -> nn.Module:
    router = loss_free(D, 4, k=1) if layer == 1 else mk.routers.switch(D, 4, jitter=0.0)
    return mk.MoELayer(router, mk.experts.GroupedMLP(4, D, 16, dropout=0.1), shared=MLP(D, 8))


def network() -> DecoderOnly:
    torch.manual_seed(0)
    return DecoderOnly(VOCAB, D, 2, 4, 16, feed_forward=every_other(sparse))


def make_batch(seed: int) -> dict[str, Batch]:
    ids = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(seed))
    mask, language = torch.ones_like(ids, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    return {"causal_lm": Batch("causal_lm", ids, mask, ids, mask, None, language, language)}


def fit(module: MultitaskModule, tmp_path: Path, steps: int = 2, first: int = 0, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, limit_val_batches=0, default_root_dir=str(tmp_path), **options,
    )  # fmt: skip
    data = DataLoader([make_batch(first + n) for n in range(steps)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, data, DataLoader([make_batch(0)["causal_lm"]], batch_size=None))  # type: ignore[arg-type]
    return trainer


def module_of(backbone: nn.Module, **options: Any) -> MultitaskModule:
    aux = mk.AuxLosses(load_balance=1e-2)
    rate = {"lr": 0.05, "weight_decay": 0.1}
    return MultitaskModule(backbone, [CausalLMHead()], aux=aux, optimizer=lambda m: adamw(m, **rate), **options)


def test_subsets_part_the_model() -> None:
    """Experts and routers are the sparse part, the rest is the other; shared branches are dense feed-forwards."""
    model = network()
    add_adapters(model, rank=2)
    names = {s: SUBSETS[s].find(model) for s in SUBSETS}
    assert names["all"] == {name for name, _ in model.named_parameters()}
    assert names["moe"] | names["non_moe"] == names["all"]
    assert not names["moe"] & names["non_moe"]
    assert names["experts"] | names["routers"] == names["moe"]
    assert {name for name in names["feed_forward"] if "adapter" not in name} == {
        f"decoder.layers.{n}.feed_forward.{shared}{w}.weight"
        for n, shared in ((0, ""), (1, "shared."), (2, ""), (3, "shared."))
        for w in ("w_in", "w_out")
    }
    assert names["attention"] == {name for name in names["all"] if "attention." in name}
    assert names["adapters"] == {name for name in names["all"] if "adapter" in name}
    assert names["routers"] == {f"decoder.layers.{n}.feed_forward.router.weight" for n in (1, 3)}
    assert (ATTENTION | FEED_FORWARD).find(model) == names["attention"] | names["feed_forward"]
    assert (ALL - ROUTERS).find(model) == subset("all - routers").find(model) == names["all"] - names["routers"]
    assert subset("moe-routers+attention").find(model) == names["experts"] | names["attention"]
    assert subset("attention+moe-experts").find(model) == names["attention"] | names["routers"]
    with pytest.raises(ValueError, match=r"got 'router'\. Did you mean 'routers'"):
        subset("all-router")
    with pytest.raises(ValueError, match=r"got ''\. There are: adapters, all"):
        subset("all-")


@pytest.mark.parametrize("name", ["non_moe", "moe", "attention", "feed_forward", "all-routers", "adapters"])
def test_what_is_not_chosen_does_not_change(name: str, tmp_path: Path) -> None:
    """Not by gradients, not by weight decay; and everything that is chosen does."""
    model = network()
    if name == "adapters":
        add_adapters(model, rank=2)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".up"):
                nn.init.normal_(parameter, std=0.1)  # a pair whose `up` is zero gives `down` no gradient
    module = module_of(model)
    found = train_only(module, subset(name))
    before = copy.deepcopy(module.state_dict())
    fit(module, tmp_path)
    changed = {n for n, value in module.state_dict().items() if not torch.equal(value, before[n])}
    moved = {"backbone.decoder.layers.1.feed_forward.router.bias"} if name == "moe" else set()
    assert changed - found.names <= moved
    assert found.names <= changed
    assert found.trained == sum(before[n].numel() for n in found.names) < found.total


def test_a_frozen_router_stands_still(tmp_path: Path) -> None:
    """Neither the bias of a loss-free router nor a schedule moves; thawed, both do."""
    torch.manual_seed(0)
    gate = dense_to_sparse(D, 4, decay_steps=10)

    def layer(number: int, side: str) -> nn.Module:
        router = gate if number == 0 else loss_free(D, 4, k=1, update_rate=0.1)
        return mk.MoELayer(router, mk.experts.GroupedMLP(4, D, 16))

    model = DecoderOnly(VOCAB, D, 2, 2, 16, feed_forward=layer)
    biased: Any = model.decoder.blocks[1].feed_forward.router
    module = MultitaskModule(model, [CausalLMHead()])
    train_only(module, NON_MOE)
    fit(module, tmp_path)
    assert int(gate.step) == 0
    assert not biased.bias.any()
    train_only(module, NON_MOE | ROUTERS)
    fit(module, tmp_path)
    assert int(gate.step) == 2
    assert biased.bias.any()


def test_schedules_go_on_where_the_run_before_left_them(tmp_path: Path) -> None:
    """`steps_before` is told to components, and kept in checkpoints."""
    gate = dense_to_sparse(D, 4, decay_steps=1000)
    model = DecoderOnly(
        VOCAB, D, 2, 1, 16, feed_forward=lambda n, s: mk.MoELayer(gate, mk.experts.GroupedMLP(4, D, 16))
    )
    module = MultitaskModule(model, [CausalLMHead()], steps_before=500)
    trainer = fit(module, tmp_path)
    assert int(gate.step) == 502
    assert isinstance(gate.temperature, ExponentialDecay)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = MultitaskModule(model, [CausalLMHead()])
    again.on_load_checkpoint(torch.load(tmp_path / "x.ckpt", weights_only=True))
    assert again.steps_before == 500


def test_expert_dropout_is_the_experts_alone() -> None:
    model = network()
    set_expert_dropout(model, 0.4)
    for name, part in model.named_modules():
        if hasattr(part, "dropout"):
            assert part.dropout == (0.4 if isinstance(part, Experts) else 0.0), name
    with pytest.raises(ValueError, match=r"in \[0, 1\): got 1"):
        set_expert_dropout(model, 1.0)
    with pytest.raises(ValueError, match="it is dense"):
        set_expert_dropout(DecoderOnly(VOCAB, D, 2, 1, 16), 0.4)


def test_train_capacity_decides_what_is_dropped() -> None:
    """A factor of 1/2 drops half of the tokens at least, in training alone."""
    layer = mk.MoELayer(mk.routers.switch(D, 4, jitter=0.0), mk.experts.GroupedMLP(4, D, 16))
    x = torch.randn(64, D)
    set_train_capacity(layer, 0.5)
    assert int(layer.train()(x).routing.kept.sum()) <= 32
    assert layer.eval()(x).routing.kept.all()
    set_train_capacity(layer, None)
    assert layer.train()(x).routing.kept.all()
    with pytest.raises(ValueError, match="routers with a capacity"):
        set_train_capacity(nn.Linear(2, 2), 1.0)


def test_optimizer_state_is_carried_on(tmp_path: Path) -> None:
    """One step, then another run with the slots of the first: the same as two steps in one run."""
    whole, first = module_of(network()), module_of(network())
    for one in (whole, first):  # dropout and load-free bias are another matter
        set_expert_dropout(one, 0.0)
        for part in one.modules():
            if isinstance(part, mk.routers.LossFreeRouter):
                part.update_rate = 0.0
    fit(whole, tmp_path, steps=2)
    optimizer = fit(first, tmp_path, steps=1).optimizers[0]
    slots = {name: optimizer.state[p] for name, p in first.named_parameters() if p in optimizer.state}
    second = module_of(copy.deepcopy(first.backbone))
    fresh = copy.deepcopy(second)
    second._optimizer = with_slots(second._optimizer, slots)  # type: ignore[arg-type]
    fit(second, tmp_path, steps=1, first=1)
    for a, b in zip(second.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    fit(fresh, tmp_path, steps=1, first=1)
    assert not all(torch.allclose(a, b) for a, b in zip(fresh.parameters(), whole.parameters(), strict=True))


def test_slots_lie_where_a_fused_step_wants_them() -> None:
    """State that was read to host memory, and a model on a GPU: steps are counted beside fused parameters alone."""
    model = nn.Linear(4, 4)
    slots = {
        name: {"step": torch.tensor(3.0), "exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
        for name, p in model.named_parameters()
    }
    with pretended_gpu():
        model.to("cuda")
        for fused in (True, False):

            def make(module: nn.Module, fused: bool = fused) -> torch.optim.Optimizer:
                return torch.optim.AdamW(module.parameters(), fused=fused)

            optimizer = with_slots(make, slots)(model)
            state = optimizer.state[model.weight]
            assert state["exp_avg"].is_cuda
            assert state["step"].is_cuda == fused
            assert float(state["step"]) == 3.0
            assert state["step"] is not slots["weight"]["step"]


def test_slots_that_do_not_fit_are_passed_over() -> None:
    model = network()
    train_only(model, EXPERTS)
    slots = {name: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(p)} for name, p in model.named_parameters()}
    odd = next(iter(EXPERTS.find(model)))
    slots[odd]["exp_avg"] = torch.zeros(1)
    optimizer = with_slots(lambda m: adamw(m, lr=0.1), slots)(model)
    stated = {name for name, p in model.named_parameters() if p in optimizer.state}
    assert stated == EXPERTS.find(model) - {odd}


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="it has none that are moe"):
        train_only(DecoderOnly(VOCAB, D, 2, 1, 16), MOE)
    with pytest.raises(ValueError, match="none that are adapters"):
        train_only(network(), ADAPTERS)
