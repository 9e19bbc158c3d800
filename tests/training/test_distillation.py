"""Distillation: the loss is the formula, stages end at their step, and the teacher is nobody's but its own."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import moekit as mk
from moekit.data.batch import Batch
from moekit.heads import CausalLMHead, Head, MaskedLMHead, ReplacedTokenHead, TranslationHead
from moekit.training.distillation import (
    Added,
    DistillationModule,
    Falling,
    Mixture,
    Staged,
    Teacher,
    Weights,
    kl_divergence,
    mixture_of_students,
    switch,
)
from moekit.training.multitask import MultitaskModule
from moekit.transformer import DecoderOnly, EncoderDecoder, EncoderOnly, every_other

VOCAB = 40


def sparse(dim: int) -> Any:
    return every_other(
        lambda layer, side: mk.MoELayer(mk.routers.switch(dim, 4, jitter=0.0), mk.experts.GroupedMLP(4, dim, 16))
    )


def translator(seed: int, dim: int = 8, layers: int = 2, dense: bool = False) -> tuple[nn.Module, Head]:
    torch.manual_seed(seed)
    feed_forward = None if dense else sparse(dim)
    return EncoderDecoder(VOCAB, dim, 2, layers, layers, 16, feed_forward=feed_forward), TranslationHead(
        label_smoothing=0.1
    )


def writer(seed: int, dim: int = 8, layers: int = 2, dense: bool = False) -> tuple[nn.Module, Head]:
    torch.manual_seed(seed)
    return DecoderOnly(VOCAB, dim, 2, layers, 16, feed_forward=None if dense else sparse(dim)), CausalLMHead()


MAKE = {"translation": translator, "causal_lm": writer}


def batch(task: str, seed: int = 0, rows: int = 4, padding: int = 0) -> Batch:
    """Rows of lengths 6 and 4 in turn; padding holds a token that nobody may look at."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6 + padding) < torch.tensor([6, 4] * (rows // 2))[:, None]
    drawn = torch.randint(3, VOCAB, (rows, 6), generator=generator)
    text = torch.where(mask, F.pad(drawn, (0, padding)), 0)
    language = torch.zeros(rows, dtype=torch.int64)
    return Batch(task, text, mask, text, mask, None, language, language)


def distilled(task: str, objective: Any, temperature: float = 1.0, dim: int = 8, **options: Any) -> DistillationModule:
    """A dense, shallower (and maybe wider) student of a sparse teacher."""
    model, head = MAKE[task](1)
    student, own = MAKE[task](2, dim=dim, layers=1, dense=True)
    return DistillationModule(
        student, [own], Teacher(model, [head]), objective=objective, temperature=temperature, **options
    )


def fit(module: L.LightningModule, batches: list[Any], tmp_path: Path, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_steps": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
        "num_sanity_val_steps": 0, "limit_val_batches": 0, "default_root_dir": str(tmp_path),
    }  # fmt: skip
    trainer = L.Trainer(**(settings | options))
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader([batch("translation")], batch_size=None))
    return trainer


def literal_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Token by token."""
    total = torch.zeros((), dtype=student.dtype)
    for s, t in zip(student / temperature, teacher / temperature, strict=True):
        p, q = t.softmax(-1), s.softmax(-1)
        total = total + (p * (p / q).log()).sum()
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_the_formula(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    expected = literal_kl(student, teacher, temperature)
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), expected)
    assert float(kl_divergence(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-6)
    empty = kl_divergence(student[:0], teacher[:0])
    empty.backward()
    assert float(empty.detach()) == 0.0
    assert student.grad is not None


def test_objectives() -> None:
    assert switch().weights(10**9) == Weights(0.75, 0.25)
    assert Added(0.5).weights(3) == Weights(1.0, 0.5)
    staged = mixture_of_students(until=100, alpha=2.0)
    assert [staged.weights(step) for step in (0, 99, 100)] == [Weights(1.0, 2.0), Weights(1.0, 2.0), Weights(1.0, 0.0)]
    assert Staged(Mixture(0.4), 1).weights(1) == Weights(1.0, 0.0)
    with pytest.raises(ValueError, match=r"share in 0\.\.1: got 1\.5"):
        Mixture(1.5)
    with pytest.raises(ValueError, match="must not be negative: got -1"):
        Added(-1.0)
    with pytest.raises(ValueError, match="0 or more: got -1"):
        Staged(Mixture(), -1)


def test_a_teacher_that_falls_silent_by_degrees() -> None:
    """Linear: 1 - t; cosine: (1 + cos pi t) / 2; the labels' weight goes to 1 as fast."""
    linear = Falling(Added(2.0), until=14, begin=10)
    found = [linear.weights(step) for step in (0, 10, 11, 13, 14, 99)]
    assert found == [Weights(1.0, weight) for weight in (2.0, 2.0, 1.5, 0.5, 0.0, 0.0)]
    cosine = Falling(Mixture(0.25), until=4, form="cosine")
    for step, left in ((0, 1.0), (1, 0.5 + 0.5 * math.cos(math.pi / 4)), (2, 0.5), (4, 0.0)):
        weights = cosine.weights(step)
        assert weights.teacher == pytest.approx(0.25 * left)
        assert weights.label == pytest.approx(1 - 0.25 * left)
    for wrong, message in (
        ({"until": 0}, "got begin=0 and until=0"),
        ({"until": 3, "begin": 3}, "got begin=3 and until=3"),
        ({"until": 3, "form": "step"}, 'must be "linear" or "cosine": got \'step\''),
    ):
        with pytest.raises(ValueError, match=message):
            Falling(Added(), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", MAKE)
@pytest.mark.parametrize("dim", [8, 12])
def test_loss_and_gradients_are_the_formula(task: str, dim: int, tmp_path: Path) -> None:
    """0.75 * label loss + 0.25 * KL, for two models of different depth and width, without padding."""
    module = distilled(task, Mixture(0.25), temperature=2.0, dim=dim)
    again = copy.deepcopy(module)
    seen: list[Tensor] = []

    class Record(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object) -> None:
            seen.extend(p.grad.clone() for p in pl_module.parameters() if p.grad is not None)

    trainer = fit(module, [{task: batch(task)}], tmp_path, callbacks=[Record()])

    head: Any = again.heads[task]
    teacher: Any = again.teacher
    ours = head.score(batch(task), again.backbone)
    theirs = teacher.heads[task].score(batch(task), teacher.backbone)
    log = ours.logits.log_softmax(-1)
    nll = -log.gather(1, ours.labels[:, None]).mean()
    epsilon = head.label_smoothing
    label = (1 - epsilon) * nll - epsilon * log.mean()
    kl = literal_kl(ours.logits, theirs.logits, 2.0)
    assert ours.labels.numel() == 2 * (5 + 3)  # of 4 rows of 6 and 4 tokens, the first of each is not predicted
    loss = 0.75 * label + 0.25 * kl
    loss.backward()
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], loss.detach())
    torch.testing.assert_close(trainer.callback_metrics[f"train/{task}/teacher_loss"], 0.25 * kl.detach())
    torch.testing.assert_close(trainer.callback_metrics[f"train/{task}/loss"], nll.detach())
    expected = [p.grad for p in again.parameters() if p.grad is not None]
    assert len(seen) == len(expected) > 0
    for a, b in zip(seen, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sparse_student_keeps_its_router_losses(tmp_path: Path) -> None:
    model, head = translator(1)
    student, own = translator(2, layers=2)
    aux = mk.AuxLosses(load_balance=0.1)
    module = DistillationModule(student, [own], Teacher(model, [head]), objective=Added(1.0), aux=aux)
    before = copy.deepcopy(module)
    trainer = fit(module, [{"translation": batch("translation")}], tmp_path)
    before.train()
    out = before.heads["translation"](batch("translation"), before.backbone)
    scores: Any = before.teacher.score(batch("translation"))
    kl = kl_divergence(before.heads["translation"].score(batch("translation"), before.backbone).logits, scores.logits)  # type: ignore[operator]
    total = out.loss + kl + aux(*out.routings.values())[0]
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], total.detach())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stage_ends_at_the_optimizer_step(accumulate: int, tmp_path: Path) -> None:
    """The teacher runs in the batches of the first two steps, and in no other."""
    module = distilled("translation", Staged(Added(1.0), 2))
    heard: list[int] = []
    score = module.teacher.score

    def listening(given: Batch) -> Any:
        heard.append(module.global_step)
        return score(given)

    module.teacher.score = listening  # type: ignore[method-assign]
    batches = [{"translation": batch("translation", seed)} for seed in range(4 * accumulate)]
    trainer = fit(module, batches, tmp_path, max_steps=4, accumulate_grad_batches=accumulate)
    assert trainer.callback_metrics["train/translation/teacher_loss"] == 0
    assert heard == [0] * accumulate + [1] * accumulate


def test_after_the_stage_training_is_as_without_a_teacher(tmp_path: Path) -> None:
    module = distilled("translation", Staged(Added(1.0), 0))
    student, own = translator(2, layers=1, dense=True)
    plain = MultitaskModule(student, [own])
    batches = [{"translation": batch("translation", seed)} for seed in range(2)]
    for one in (module, plain):
        fit(one, batches, tmp_path, max_steps=2)
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_teacher_is_frozen_and_in_no_checkpoint(tmp_path: Path) -> None:
    module = distilled("translation", Added(1.0))
    teacher = module.teacher
    before = copy.deepcopy(teacher.backbone.state_dict())
    plain = MultitaskModule(*[part if i == 0 else [part] for i, part in enumerate(translator(2, layers=1, dense=True))])  # type: ignore[arg-type]
    module.train()  # as Lightning does
    assert not teacher.backbone.training
    trainer = fit(module, [{"translation": batch("translation")}] * 2, tmp_path, max_steps=2)
    assert not any(child.training for child in teacher.backbone.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.backbone.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.backbone.state_dict().items())
    trainer.save_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == plain.state_dict().keys()
    assert all(saved[name].shape == value.shape for name, value in plain.state_dict().items())
    stepped = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert stepped == {id(p) for p in module.parameters()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_teacher_has_the_precision_of_the_student(precision: str, tmp_path: Path) -> None:
    """Which the Trainer gives the student after `setup`; a teacher in float32 would take twice the memory."""
    module = distilled("translation", Added(1.0))
    fit(module, [{"translation": batch("translation")}], tmp_path, precision=precision)
    wanted = {"32-true": torch.float32, "bf16-true": torch.bfloat16}[precision]
    assert {p.dtype for p in module.backbone.parameters()} == {wanted}
    assert {p.dtype for p in module.teacher.backbone.parameters()} == {wanted}


@pytest.mark.parametrize("task", MAKE)
def test_padding_changes_nothing(task: str) -> None:
    """Neither the number of padded positions nor what they hold."""
    module = distilled(task, Mixture(0.5)).eval()
    narrow, wide = batch(task), batch(task, padding=5)
    dirty = dataclasses.replace(wide, target=torch.where(wide.target_mask, wide.target, 7))  # type: ignore[arg-type]

    def loss(given: Batch) -> Tensor:
        return module.learn(given).loss

    torch.testing.assert_close(loss(wide), loss(narrow))
    torch.testing.assert_close(loss(dirty), loss(narrow))


def test_accumulated_halves_are_the_whole(tmp_path: Path) -> None:
    """Two batches of equally many predictions make the step that their union makes."""
    whole = batch("translation", rows=4)
    halves = [
        dataclasses.replace(
            whole,
            **{
                f.name: value[rows]
                for f in dataclasses.fields(whole)
                if f.init and isinstance(value := getattr(whole, f.name), Tensor)
            },
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]
    found = []
    for batches, accumulate in (([whole], 1), (halves, 2)):
        module = distilled("translation", Mixture(0.25), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        fit(module, [{"translation": b} for b in batches], tmp_path, accumulate_grad_batches=accumulate)
        found.append(list(module.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_pairs_are_refused() -> None:
    model, head = translator(1)
    student, own = translator(2)
    teacher = Teacher(model, [head])
    with pytest.raises(ValueError, match="it lacks masked_lm, and has translation"):
        DistillationModule(student, [own, MaskedLMHead(8)], teacher, objective=Mixture())
    detect = ReplacedTokenHead(EncoderOnly(VOCAB, 8, 2, 1, 16), 8)
    with pytest.raises(ValueError, match="replaced_token does not"):
        DistillationModule(student, [detect], teacher, objective=Mixture())
    other = EncoderDecoder(VOCAB + 1, 8, 2, 1, 1, 16)
    with pytest.raises(ValueError, match="the same vocabulary: got 41 and 40"):
        DistillationModule(other, [own], teacher, objective=Mixture())
    with pytest.raises(ValueError, match="temperature must be positive and finite: got 0"):
        DistillationModule(student, [own], teacher, objective=Mixture(), temperature=0.0)
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 4\)"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    for wrong in (-1.0, math.inf, math.nan):  # an infinite one makes infinity times nothing of the loss
        with pytest.raises(ValueError, match=f"temperature must be positive and finite: got {wrong}"):
            kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3), wrong)
