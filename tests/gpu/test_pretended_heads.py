"""Heads, batches, and a step of every recipe on a GPU."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from devices import EVERY, PRECISIONS, autocast, examples, explained, gpu
from torch import Tensor, nn

from moekit.data.batch import Batch
from moekit.data.batching import EvaluationBatches, Loader
from moekit.layer import AuxLosses
from moekit.runs.module import make_module
from moekit.testing import seeded
from moekit.training.adafactor import Adafactor
from moekit.training.distillation import Added, DistillationModule, Teacher
from moekit.training.multitask import MultitaskModule
from moekit.training.optimizers import scale_expert_gradients
from moekit.transformer import RelativePositions
from moekit.transformer.attention import plan_attention

TASKS, make_batch, make_head = examples("tasks/test_heads.py", "TASKS", "make_batch", "make_head")
NAMES, recipe, SIZES = examples("recipes/test_every_recipe.py", "NAMES", "recipe", "SIZES")


@EVERY
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("task", TASKS)
def test_a_head_waits_for_nothing(task: str, training: bool, precision: str, device: str) -> None:
    """Padded layers in training: 0, forward and backward; packed ones in evaluation read their counts, once each."""
    dtype, amp = PRECISIONS[precision]
    head, model = make_head(task)
    head, model = head.to(dtype).train(training), model.to(dtype).train(training)
    batch = make_batch(task)

    def run(head: Any, model: nn.Module, batch: Batch, where: str, watch: Any) -> Any:
        with seeded(2), watch() as forward, autocast(amp, where):
            out = head(batch, model)
        with watch() as backward:
            out.loss.backward()
        both = [*model.named_parameters(), *head.named_parameters()]
        gradients = {name: p.grad.detach().float().cpu() for name, p in both if p.grad is not None}
        return out, gradients, forward, backward

    with gpu(device) as found:
        there = copy.deepcopy(head).to("cuda"), copy.deepcopy(model).to("cuda"), batch.to("cuda")
        out, got, forward, backward = run(*there, "cuda", found.watch)
        loss, correct = out.loss.item(), out.correct.item()
    right, wanted, _, _ = run(head, model, batch, "cpu", lambda: contextlib.nullcontext({}))
    assert got.keys() == wanted.keys()
    assert all(gradient.isfinite().all() for gradient in got.values())
    if device == "pretended":
        assert loss == pytest.approx(right.loss.item(), rel=1e-5 if precision == "float32" else 3e-2)
        assert precision != "float32" or correct == right.correct.item()
    explained(forward)
    assert sum(forward.values()) == (0 if training or device == "real" else len(out.routings))
    assert not backward


@pytest.mark.parametrize("kind", ["multitask", "distillation"])
def test_steps_of_a_module_and_every_wait_says_why(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training step with optimizer, one that is logged, evaluation: losses are the CPU's."""
    made = [make_head(task) for task in ("translation", "denoising")]
    heads, options = [head for head, _ in made], {"aux": AuxLosses(load_balance=0.01), "log_routing_every": 1}
    if kind == "distillation":
        teacher = [make_head(task) for task in ("translation", "denoising")]
        teaching = Teacher(teacher[0][1], [head for head, _ in teacher])
        module: Any = DistillationModule(made[0][1], heads, teaching, objective=Added(), **options)
    else:
        module = MultitaskModule(made[0][1], heads, **options)
    batches = {head.task: make_batch(head.task) for head in heads}
    for name in ("log", "log_dict"):
        monkeypatch.setattr(MultitaskModule, name, lambda self, *args, **options: None)
    monkeypatch.setattr(MultitaskModule, "_learning_rate", lambda self: 0.1)

    def begin(module: Any, where: str) -> Any:
        strategy = SimpleNamespace(root_device=torch.device(where))
        state = SimpleNamespace(fn="fit")
        module._trainer = SimpleNamespace(
            world_size=1, log_every_n_steps=2, global_step=0, strategy=strategy, state=state, sanity_checking=False
        )
        module.train().setup("fit")
        module.on_fit_start()
        return module

    def run(module: Any, batches: Any) -> list[Tensor]:
        optimizer = Adafactor(module.parameters(), 0.01, min_factored_size=8)
        losses = []
        for _ in range(2):
            loss = module.training_step(batches, 0)["loss"]
            loss.backward()
            scale_expert_gradients(module)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    there = copy.deepcopy(module)
    wanted = run(begin(module, "cpu"), batches)
    with gpu() as found:
        there = begin(there.to("cuda"), "cuda")
        moved = {task: batch.to("cuda") for task, batch in batches.items()}
        with found.watch() as waits:
            got = run(there, moved)
        explained(waits)
        assert not waits or kind == "distillation"  # whose teacher's layers, in evaluation, read their counts
        there.trainer.log_every_n_steps = 1
        with found.watch() as logged:
            run(there, moved)
        explained(logged)
        there.eval()
        with found.watch() as evaluation, torch.no_grad():
            for batch in moved.values():
                there.validation_step(batch, 0)
            there.on_validation_epoch_end()
        explained(evaluation)
        torch.testing.assert_close(torch.stack(got).cpu(), torch.stack(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_places_are_those_of_the_masks(task: str) -> None:
    batch = make_batch(task)
    assert batch.predicted is not None
    if batch.labels is not None:
        mask = batch.labels >= 0
        assert torch.equal(batch.labels.flatten()[batch.predicted], batch.labels[mask])
        assert batch.real is not None
        assert torch.equal(batch.source.flatten()[batch.real], batch.source[batch.source_mask])
        other = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100))
        assert other.predicted is not None
        assert other.predicted.numel() == 0  # looked for again
    else:
        assert batch.target is not None
        assert batch.target_mask is not None
        real = batch.target_mask[:, 1:]
        assert torch.equal(batch.target[:, 1:].reshape(-1)[batch.predicted], batch.target[:, 1:][real])
    for copied in (batch.to("cpu"), batch.to("meta")):
        assert copied.predicted is not None
        assert copied.predicted.shape == batch.predicted.shape


def test_replaced_tokens_are_drawn_as_multinomial_draws() -> None:
    head, _ = make_head("replaced_token")
    batch = make_batch("replaced_token")
    filled, _ = head.eval().fill(batch)
    hidden = head.generator.encode(batch.source, batch.source_mask, language=batch.source_language).hidden
    masked = batch.labels >= 0
    probs = head.generator.logits(head.generator_transform(hidden[masked])).float().softmax(-1)
    drawn = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    assert torch.equal(filled, batch.source.masked_scatter(masked, drawn))


def test_a_batch_is_copied_ahead_from_pinned_memory() -> None:
    batch = make_batch("translation")
    with gpu() as found:
        pinned = batch.pin_memory()
        with found.watch() as waits:
            there = pinned.to("cuda")
        assert there.source.is_cuda
        assert not waits
        with found.watch() as waits:
            batch.to("cuda")  # pageable: the host waits anyway
        assert waits
        with found.watch() as waits:
            pinned.to("cuda", non_blocking=False)
        assert waits


def test_evaluation_pins_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("moekit.data.batching.DataLoader", lambda *_, pin_memory, **__: asked.append(pin_memory) or ())
    batches = EvaluationBatches.__new__(EvaluationBatches)
    batches._batches = []
    for pin in (True, False):
        list(Loader(batches, len(batches), pin_memory=pin))
    assert asked == [True, False]


def test_t5s_bias_lies_in_one_piece() -> None:
    """Else the attention kernel of a GPU copies it in every layer."""
    positions = RelativePositions(4)
    for mask in (None, torch.ones(2, 5, dtype=torch.bool)):
        plan = plan_attention(torch.randn(2, 5, 8), positions, 2, offset=0, causal=True, key_mask=mask)
        assert plan.mask is not None
        assert plan.mask.is_contiguous()
        plain = plan_attention(torch.randn(2, 5, 8), positions, 2, offset=0, causal=False)
        assert plain.mask is not None
        assert plain.mask.is_contiguous()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def small(name: str, cache: Path) -> Any:
    """The tiny variant, smaller."""
    config = recipe(name).variants["tiny"].config
    sizes = {key: value for key, value in SIZES.items() if getattr(config.model, key, None)}
    data = dataclasses.replace(config.data, vocab_size=400, max_length=32, babel_sentences=300, cache=str(cache))
    tasks = {
        field.name: dataclasses.replace(getattr(config.tasks, field.name), tokens=96)
        for field in dataclasses.fields(config.tasks)
        if getattr(config.tasks, field.name).tokens
    }
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **sizes),
        data=data,
        tasks=dataclasses.replace(config.tasks, **tasks),
        train=dataclasses.replace(config.train, max_steps=3, accelerator="cpu"),
    )


# Asked by an LSTM whose weights say cuda:0; a torch for the CPU has no such library.
@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
@EVERY
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_every_recipe(name: str, cache: Path, device: str) -> None:
    """Forward of every task, losses of routers, statistics, backward; then a step of validation; in every precision."""
    found = importlib.import_module(f"moekit.recipes.{name}").RECIPE
    config = small(name, cache)
    data = config.batches()
    data.prepare_data()
    module, _ = make_module(found, config, data)
    batches: dict[str, Batch] = next(iter(data.train_dataloader()))
    sparse = len([m for m in module.modules() if type(m).__name__ == "MoELayer"])
    for precision, (dtype, amp) in PRECISIONS.items():
        with gpu(device) as there, seeded(3):
            model = copy.deepcopy(module).to(dtype).to("cuda").train()
            moved = {task: batch.to("cuda") for task, batch in batches.items()}
            with there.watch() as forward, autocast(amp):
                total: Tensor = torch.zeros((), device="cuda")
                for batch in moved.values():
                    out = model.learn(batch)
                    total = total + out.loss
                    if model.aux is not None and out.routings:
                        total = total + model.aux(*out.routings.values())[0]
                    model._count(model.train_routing, out, batch)
            with there.watch() as backward:
                total.backward()
            assert bool(total.isfinite()), precision
            missing = [name for name, p in model.backbone.named_parameters() if p.requires_grad and p.grad is None]
            assert not missing or len(missing) < len(list(model.backbone.parameters())), missing
            explained(forward)
            explained(backward)
            assert sum(forward.values()) <= 2 * sparse * len(moved)
            assert not backward
            model.eval()
            with there.watch() as evaluation, torch.no_grad(), autocast(amp):
                for batch in moved.values():
                    model.validation_step(batch, 0)
            explained(evaluation)
