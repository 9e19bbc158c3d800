"""What routers are told about their training forwards: once, after the backward, and in training alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from moekit.experts import GroupedMLP
from moekit.layer import MoELayer
from moekit.routers import Balance, ReLURouter, TopKRouter, dense_to_sparse, loss_free
from moekit.routing import Router, Routing, RoutingContext
from moekit.testing import seeded, skewed_tokens

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

D, E, TOKENS = 6, 4, 10


class Told(TopKRouter):
    """Writes down what it is told."""

    def __init__(self) -> None:
        super().__init__(D, E)
        self.observes = True
        self.news: list[Any] = []

    def observe(self, routing: Routing) -> None:
        self.news.append(routing)

    def on_step_end(self, step: int) -> None:
        self.news.append(step)


class Model(L.LightningModule):
    """A sparse layer deep inside; weights stand still, so that only observing moves anything."""

    def __init__(self, router: Router, recompute: str = "never", forwards: int = 1) -> None:
        super().__init__()
        with seeded(0):
            self.layers = nn.ModuleList([MoELayer(router, GroupedMLP(E, D, 4))])
        self.recompute, self.forwards = recompute, forwards
        self.balance: list[float] = []

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, routing = self.layers[0](x)
        return hidden.square().mean(), routing.losses.get("load_balance", torch.zeros(()))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        total = batch.new_zeros(())
        for _ in range(self.forwards):
            x = batch.clone().requires_grad_()
            if self.recompute == "never":
                loss, balance = self.loss(x)
            else:
                loss, balance = checkpoint(self.loss, x, use_reentrant=self.recompute == "reentrant")
            self.balance.append(float(balance.detach()))
            total = total + loss + balance
        return total

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Tensor, _: int) -> Tensor:
        return self.loss(batch)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches(count: int) -> Tensor:
    return torch.stack([skewed_tokens(TOKENS, D, seed=seed) for seed in range(count)])


def loader(count: int) -> DataLoader[Tensor]:
    return DataLoader(batches(count), batch_size=None)  # type: ignore[arg-type]


def trainer(tmp_path: Path, **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(settings | kwargs))


def router_of(build: Any) -> Any:
    with seeded(1):
        router = build()
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return router


@pytest.mark.parametrize("recompute", ["never", "plain", "reentrant"])
def test_each_training_forward_is_told_once_before_the_step(tmp_path: Path, recompute: str) -> None:
    router = router_of(Told)
    trainer(tmp_path, accumulate_grad_batches=3, val_check_interval=2).fit(
        Model(router, recompute), loader(7), loader(2)
    )
    kinds = ["routing" if isinstance(news, Routing) else news for news in router.news]
    assert kinds == ["routing"] * 3 + [1] + ["routing"] * 3 + [2, "routing", 3]
    told = [news for news in router.news if isinstance(news, Routing)]
    for x, routing in zip(batches(7), told, strict=True):
        assert torch.equal(routing.expert, (x @ router.weight.t()).argmax(-1))
        assert not routing.weight.requires_grad
        assert not any(loss.requires_grad for loss in routing.losses.values())


def test_all_forwards_of_a_batch_are_told_after_its_backward(tmp_path: Path) -> None:
    class Root(Model):
        def on_after_backward(self) -> None:
            assert not [news for news in router.news if isinstance(news, Routing)][
                2 * self.trainer.fit_loop.batch_idx :
            ]

    router = router_of(Told)
    trainer(tmp_path).fit(Root(router, "plain", forwards=2), loader(3))
    assert [isinstance(news, Routing) for news in router.news] == [True, True, False] * 3


def test_evaluation_and_prediction_are_not_told(tmp_path: Path) -> None:
    router = router_of(Told)
    run = trainer(tmp_path, num_sanity_val_steps=2)
    run.validate(Model(router), loader(2), verbose=False)
    run.predict(Model(router), loader(2))
    assert router.news == []

    class EvaluatingInside(Model):
        """Runs the layer in evaluation mode inside a training step, as a teacher would."""

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            self.layers.eval()
            self.loss(batch)
            self.layers.train()
            return super().training_step(batch, index)

        def on_train_epoch_end(self) -> None:
            self.loss(torch.ones(2, D))  # in training mode, but in no training batch

    trainer(tmp_path, max_steps=2).fit(EvaluatingInside(router), loader(2))
    assert [isinstance(news, Routing) for news in router.news] == [True, False] * 2


def test_a_router_that_does_not_observe_has_no_hook_and_others_lose_theirs_at_the_end(tmp_path: Path) -> None:
    seen: list[int] = []

    class Root(Model):
        def on_train_start(self) -> None:
            seen.append(len(self.layers[0].router._forward_hooks))  # type: ignore[union-attr, arg-type]

    plain, told = router_of(lambda: TopKRouter(D, E)), router_of(Told)
    for router in (plain, told):
        trainer(tmp_path, max_steps=1).fit(Root(router), loader(2))
        assert not router._forward_hooks
    assert seen == [0, 1]

    class Failing(Model):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            raise RuntimeError("broken")

    router = router_of(Told)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path).fit(Failing(router), loader(2))
    assert not router._forward_hooks
    assert router.news == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, where a graph breaks
def test_a_compiled_layer_is_told_as_an_eager_one(tmp_path: Path) -> None:
    routers = []
    for compiled in (False, True):
        router = router_of(Told)
        model = Model(router)
        if compiled:
            torch._dynamo.reset()
            model.layers[0].compile(backend="eager")
        trainer(tmp_path, max_steps=3).fit(model, loader(3))
        routers.append(router)
    for a, b in zip(*(router.news for router in routers), strict=True):
        assert a == b if isinstance(a, int) else torch.equal(a.expert, b.expert)


def bias_by_hand(weight: Tensor, steps: list[list[Tensor]], k: int, rate: float) -> Tensor:
    """The bias after steps of micro-batches: the k highest of sigmoid + bias, then one move by the sign."""
    bias = torch.zeros(E)
    for step in steps:
        load = [0] * E
        for x in step:
            for row in x:
                score = torch.sigmoid(weight @ row) + bias
                for e in sorted(range(E), key=lambda e: -float(score[e]))[:k]:
                    load[e] += 1
        for e in range(E):
            mean = sum(load) / E
            bias[e] += rate * ((load[e] < mean) - (load[e] > mean))
    return bias


@pytest.mark.parametrize("recompute", ["never", "plain", "reentrant"])
def test_loss_free_bias_moves_once_per_step_by_the_load_of_all_micro_batches(tmp_path: Path, recompute: str) -> None:
    """With a large rate, so that a wrong move changes the choices of the next step."""
    router = router_of(lambda: loss_free(D, E, k=2, update_rate=0.2))
    # Validation in the middle of an accumulation, which must not count.
    run = trainer(tmp_path, accumulate_grad_batches=4, val_check_interval=2)
    run.fit(Model(router, recompute), loader(12), loader(1))
    x = list(batches(12))
    expected = bias_by_hand(router.weight.detach(), [x[0:4], x[4:8], x[8:12]], 2, 0.2)
    assert torch.equal(router.bias, expected)
    assert not torch.equal(expected, bias_by_hand(router.weight.detach(), [x[0:4]], 2, 0.2))
    assert not torch.equal(expected, bias_by_hand(router.weight.detach(), [[b] for b in x], 2, 0.2))


def literal_global_balance(weight: Tensor, step: list[Tensor]) -> list[float]:
    """arXiv:2501.11873: for each micro-batch f over those of the step so far, P over its own tokens."""
    weight, hits, values = weight.detach(), [0] * E, []
    for x in step:
        logits = [[float(weight[e] @ row) for e in range(E)] for row in x]
        for row in logits:
            hits[row.index(max(row))] += 1
        probs = torch.tensor(logits, dtype=torch.float64).softmax(-1).mean(0)
        values.append(sum(E * hits[e] / sum(hits) * float(probs[e]) for e in range(E)))
    return values


@pytest.mark.parametrize("recompute", ["never", "plain", "reentrant"])
def test_global_balance_counts_the_micro_batches_of_the_step_so_far(tmp_path: Path, recompute: str) -> None:
    router = router_of(lambda: TopKRouter(D, E, balance=Balance(scope="global")))
    model = Model(router, recompute)
    gradients: list[Tensor] = []
    model.on_before_optimizer_step = lambda _: gradients.append(router.weight.grad.clone())  # type: ignore[method-assign]
    trainer(tmp_path, accumulate_grad_batches=4, val_check_interval=3).fit(model, loader(8), loader(1))
    x = list(batches(8))
    expected = literal_global_balance(router.weight, x[:4]) + literal_global_balance(router.weight, x[4:])
    assert model.balance == pytest.approx(expected, rel=1e-5)
    local = [literal_global_balance(router.weight, [batch])[0] for batch in x]
    assert model.balance[0] == pytest.approx(local[0], rel=1e-5)
    assert abs(model.balance[1] - local[1]) > 1e-3

    # The recomputation in the backward saw the same counts: gradients are those of plain forwards.
    reference = Model(router)
    by_hand = []
    for step in (x[:4], x[4:]):
        router.zero_grad()
        for batch in step:
            routing = reference.layers[0](batch).routing
            hidden = reference.layers[0](batch).hidden
            ((hidden.square().mean() + routing.losses["load_balance"]) / 4).backward()
            router.observe(routing)
        by_hand.append(router.weight.grad.clone())
        router.on_step_end(0)
    for found, wanted in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(found, wanted)


def test_state_goes_on_after_resume(tmp_path: Path) -> None:
    """Bias, coefficient and step of a run that was stopped and resumed equal those of one that was not."""

    def three() -> dict[str, Router]:
        return {
            "bias": router_of(lambda: loss_free(D, E, update_rate=0.2)),
            "coefficient.exponent": router_of(lambda: ReLURouter(D, E, 1)),
            "step": router_of(lambda: dense_to_sparse(D, E, decay_steps=10)),
        }

    for name in three():
        straight, first, second = (three()[name] for _ in range(3))
        trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2).fit(Model(straight), loader(6))
        saver = ModelCheckpoint(tmp_path / name, save_last=True)
        run = trainer(tmp_path, accumulate_grad_batches=2, callbacks=[saver], enable_checkpointing=True)
        run.fit(Model(first), loader(6))
        path = saver.last_model_path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resumed = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
            resumed.fit(Model(second), loader(6), ckpt_path=path, weights_only=True)
        half, whole, again = (dict(router.named_buffers())[name] for router in (first, straight, second))
        assert torch.equal(whole, again), name
        assert not torch.equal(whole, half), name


def test_without_a_trainer_the_same_two_methods_do_it() -> None:
    router = router_of(lambda: loss_free(D, E, k=2, update_rate=0.2)).train()
    x = list(batches(4))
    for step, pair in enumerate((x[:2], x[2:]), start=1):
        for batch in pair:
            mask = torch.arange(TOKENS) < TOKENS - 1
            router.observe(router(batch, RoutingContext(mask=mask)))
        router.on_step_end(step)
    short = [batch[:-1] for batch in x]
    assert torch.equal(router.bias, bias_by_hand(router.weight.detach(), [short[:2], short[2:]], 2, 0.2))
