"""Limits, throughput, progress, best checkpoint and random state, on a clock that tests turn."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moekit.data.batch import Batch
from moekit.training.budget import Budget
from moekit.training.callbacks.best import BestCheckpoint
from moekit.training.callbacks.gradient_norm import GradientNorm
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.limits import MaxMinutes
from moekit.training.callbacks.memory import PeakMemory
from moekit.training.callbacks.non_finite import NonFinite
from moekit.training.callbacks.progress import TrainingProgress
from moekit.training.callbacks.random_state import RandomState
from moekit.training.callbacks.throughput import Throughput, count_tokens
from moekit.training.checkpoint_io import AtomicCheckpointIO
from moekit.training.loggers import CsvLogger

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Model(L.LightningModule):
    """A batch of training takes 10 seconds, one of validation 100."""

    def __init__(self, clock: Clock | None = None, valid: list[float] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.clock = clock or Clock()
        self.valid = iter(valid or [])

    def training_step(self, batch: Any, _: int) -> Tensor:
        self.clock.now += 10
        x = batch[0] if isinstance(batch, list) else batch
        loss = self.layer(x).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.clock.now += 100

    def on_validation_epoch_end(self) -> None:
        value = next(self.valid, None)
        if value is not None:
            self.log("valid/loss", value)

    def test_step(self, batch: Any, index: int) -> None:
        self.clock.now += 100

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def data(batches: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.randn(2 * batches, 4), batch_size=2)  # type: ignore[arg-type]


def trainer(tmp_path: Path, *callbacks: Callback, **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "max_epochs": -1,
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": any(isinstance(c, TrainingProgress) for c in callbacks),
        "enable_checkpointing": any(isinstance(c, BestCheckpoint | Resumable) for c in callbacks),
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": list(callbacks),
    }
    return L.Trainer(**(settings | kwargs))


def test_max_minutes_ends_training_and_counts_validation(tmp_path: Path) -> None:
    clock, budget = Clock(), Budget(max_minutes=5)
    run = trainer(tmp_path, MaxMinutes(budget, clock=clock), val_check_interval=4)
    run.fit(Model(clock), data(8), data(1))
    # Batches 1-4: 40 s; validation: 140 s; 5-8: 180 s; 280 s; 290 s, 300 s = 5 minutes.
    assert run.global_step == 10
    assert budget.seconds == 300


def test_max_minutes_lets_the_step_under_way_come_to_its_end(tmp_path: Path) -> None:
    clock, budget = Clock(), Budget(max_minutes=1)
    run = trainer(tmp_path, MaxMinutes(budget, clock=clock), accumulate_grad_batches=4, limit_val_batches=0)
    run.fit(Model(clock), data())
    assert run.global_step == 2  # of four batches of 10 s each
    assert budget.seconds == 80


def test_time_used_survives_resume(tmp_path: Path) -> None:
    clock, budget = Clock(), Budget(max_minutes=1)
    first = trainer(tmp_path, MaxMinutes(budget, clock=clock), max_steps=4, limit_val_batches=0)
    first.fit(Model(clock), data())
    assert budget.seconds == 40
    first.save_checkpoint(tmp_path / "x.ckpt")
    clock.now += 1e6  # the night between
    budget = Budget(max_minutes=1)
    second = trainer(tmp_path, MaxMinutes(budget, clock=clock), limit_val_batches=0)
    second.fit(Model(clock), data(), ckpt_path=tmp_path / "x.ckpt")
    assert second.global_step == 6
    assert budget.seconds == 60
    second.save_checkpoint(tmp_path / "y.ckpt")
    third = trainer(tmp_path, MaxMinutes(Budget(max_minutes=1), clock=clock), limit_val_batches=0)
    third.fit(Model(clock), data(), ckpt_path=tmp_path / "y.ckpt")
    assert third.global_step == 6  # not a step more


def tokens(source: int, target: int = 0, task: str = "translation") -> Batch:
    """A batch with so many real tokens on each side, and some padding."""
    ids = torch.arange(12)
    return Batch(
        task,
        ids.view(2, 6),
        (ids < source).view(2, 6),
        ids.view(2, 6) if target else None,
        (ids < target).view(2, 6) if target else None,
        None,
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        one_text=task == "causal_lm",
    )


def test_real_tokens_are_counted() -> None:
    parts = {"translation": tokens(7, 5), "masked_lm": tokens(3, task="masked_lm")}
    assert count_tokens(parts) == 15
    assert count_tokens([tokens(4, 4, task="causal_lm"), parts]) == 19
    assert count_tokens(parts) == sum(part.num_tokens for part in parts.values())
    with pytest.raises(TypeError, match="got Tensor"):
        count_tokens(torch.zeros(2))


def test_throughput_is_measured_without_validation(tmp_path: Path) -> None:
    clock = Clock()
    meter = Throughput(lambda batch: 50, clock=clock)
    logger = CsvLogger(tmp_path)
    options: dict[str, Any] = {"val_check_interval": 3, "log_every_n_steps": 2, "logger": logger}
    run = trainer(tmp_path, meter, max_steps=7, accumulate_grad_batches=2, **options)
    run.fit(Model(clock), data(), data(2))
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert {line.split(",")[header.index("train/tokens_per_second")] for line in lines[1:]} <= {"5.0", ""}
    assert [line.split(",")[header.index("train/tokens")] for line in lines[1:]] == ["200.0", "400.0", "600.0"]
    assert meter.tokens == 700  # 14 batches
    assert meter.seconds == 140
    assert meter.tokens_per_second == 5.0
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = Throughput(lambda batch: 50, clock=clock)
    run = trainer(tmp_path, again, max_steps=8, limit_val_batches=0)
    run.fit(Model(clock), data(), ckpt_path=tmp_path / "x.ckpt")
    assert (again.tokens, again.seconds) == (750, 150)


def test_throughput_in_the_middle_of_a_window_is_in_the_checkpoint(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    clock = Clock()
    meter = Throughput(lambda batch: torch.tensor(50), clock=clock)
    trainer(tmp_path, meter, Save(), max_steps=4, limit_val_batches=0, log_every_n_steps=50).fit(Model(clock), data())
    states = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    assert states["Throughput"] == {"tokens": 150, "seconds": 30.0}


@pytest.mark.parametrize("limit", [0.05, 0.3, 1e3])
def test_the_norm_is_that_before_clipping_and_clipping_is_what_it_was(limit: float, tmp_path: Path) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.norms: list[float] = []
            self.logged: list[float] = []

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            grads = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(float(torch.cat(grads).double().norm()))

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.logged.append(float(trainer.callback_metrics["train/grad_norm"]))

    weights = []
    for extra in ([GradientNorm()], [], [GradientNorm(), NonFinite()]):
        torch.manual_seed(7)
        model, seen, batches = Model(), Seen(), data(6)
        callbacks = [*extra, *([seen] if extra else [])]
        trainer(tmp_path, *callbacks, max_steps=6, limit_val_batches=0, gradient_clip_val=limit).fit(model, batches)
        weights.append([p.detach().clone() for p in model.parameters()])
        if extra:
            assert seen.logged == pytest.approx(seen.norms, rel=1e-6)
            assert max(seen.norms) > limit or limit == 1e3
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*weights, strict=True))


def test_a_norm_that_was_found_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the gradients were changed since."""
    computed: list[int] = []
    plain = torch.nn.utils.clip_grad_norm_

    def count(*arguments: Any, **named: Any) -> Any:
        computed.append(1)
        return plain(*arguments, **named)

    class Doubles(Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(2)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", count)
    norms = []
    for others in ([NonFinite()], [NonFinite(), Doubles()], [Doubles(), NonFinite()], []):
        torch.manual_seed(7)
        callbacks, computed[:] = [GradientNorm(), *others], []
        run = trainer(
            tmp_path, *callbacks, max_steps=1, limit_val_batches=0, gradient_clip_val=0.05, log_every_n_steps=1
        )
        run.fit(Model(), data(2))
        norms.append((float(run.callback_metrics["train/grad_norm"]), len(computed)))
    assert [calls for _, calls in norms] == [0, 1, 0, 1]
    one, two, three, four = (norm for norm, _ in norms)
    assert (two, three, four) == pytest.approx((2 * one, 2 * one, one), rel=1e-6)


def test_without_clipping_there_is_no_norm(tmp_path: Path) -> None:
    run = trainer(tmp_path, GradientNorm(), max_steps=2, limit_val_batches=0)
    run.fit(Model(), data())
    assert "train/grad_norm" not in run.callback_metrics


def test_throughput_in_operations(tmp_path: Path) -> None:
    """Ten seconds a step of 50 tokens, at 3 operations a token, on a machine that makes 60 in a second."""
    clock = Clock()
    meter = Throughput(lambda batch: 50, flops_per_token=3.0, product_rate=60.0, clock=clock)
    run = trainer(tmp_path, meter, max_steps=4, limit_val_batches=0, accumulate_grad_batches=2, log_every_n_steps=2)
    run.fit(Model(clock), data(8))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged["train/tokens_per_second"] == 5.0
    assert logged["train/step_seconds"] == 20.0
    assert logged["train/flops_per_second"] == 15.0
    assert logged["train/flops_share"] == 0.25


def test_peak_memory_is_logged(tmp_path: Path) -> None:
    memory = PeakMemory()
    run = trainer(tmp_path, memory, max_steps=2, limit_val_batches=0)
    run.fit(Model(), data())
    assert 2**26 < float(run.callback_metrics["train/peak_memory"]) <= 1.001 * memory.bytes


def lines_of(tmp_path: Path, budget: Budget | None, **kwargs: Any) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    progress = TrainingProgress(budget, line_seconds=25, console=Console(file=stream), clock=clock)
    callbacks: list[Callback] = [progress, Throughput(lambda _: 50, clock=clock)]
    if budget is not None:
        callbacks.insert(0, MaxMinutes(budget, clock=clock))
    model = Model(clock)
    run = trainer(tmp_path, *callbacks, **kwargs)
    run.fit(model, data(), data(2))
    run.test(model, data(2), verbose=False)
    return stream.getvalue().splitlines()


def test_progress_in_a_log_is_a_line_now_and_then(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, None, max_steps=10, limit_val_batches=0)
    assert len(lines) == 7  # steps 1, 4, 7, 10, the end, and the two batches of the test
    assert lines[1].startswith("step 4/10  loss ")
    assert lines[1].endswith("  5 tokens/s  0:40 used  1:00 left")
    assert lines[4].startswith("step 10/10")
    assert lines[5:] == ["testing 1/2", "testing 2/2"]


def test_progress_of_a_run_limited_by_minutes(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, Budget(max_minutes=2), limit_val_batches=0)
    assert lines[-3].startswith("step 12  loss ")
    assert lines[-3].endswith("2:00/2:00 used  0:00 left")
    assert "0:40/2:00 used  1:20 left" in "".join(lines)


def test_progress_says_once_how_far_the_minutes_reach(tmp_path: Path) -> None:
    """Ten seconds a step: 12 steps in two minutes, known after the sixth."""
    lines = lines_of(tmp_path, Budget(max_steps=100, max_minutes=2), limit_val_batches=0)
    said = " ".join(line for line in lines if not line.startswith(("step", "testing")))
    assert said == (
        "At this speed train.max_minutes=2 ends the run at about step 12 of 100: 12 % of its schedule. All of it takes "
        "about 19 minutes."
    )
    lines = lines_of(tmp_path, Budget(max_minutes=2), limit_val_batches=0)
    assert lines.count("At this speed 2 minutes are about 12 steps.") == 1


def test_progress_says_nothing_of_minutes_that_suffice(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, Budget(max_steps=10, max_minutes=2), limit_val_batches=0)
    assert all(line.startswith(("step", "testing")) for line in lines)


def test_progress_shows_validation_and_epochs(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, None, max_epochs=2, check_val_every_n_epoch=1)
    assert "validating 1/2" in lines
    assert any("step 4  loss" in line and line.endswith("0:40 used  2:00 left") for line in lines)


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path) -> None:
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    progress = TrainingProgress(console=console, clock=clock)
    trainer(tmp_path, progress, max_steps=3).fit(Model(clock), data(), data(1))
    text = stream.getvalue()
    assert "step 3/3" in text
    assert "━" in text
    assert progress._bar is None  # closed
    assert text.endswith("\n") or "\x1b[?25h" in text  # the cursor is back


def test_progress_closes_after_an_exception(tmp_path: Path) -> None:
    class Failing(Model):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("broken")

    progress = TrainingProgress(console=Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, progress).fit(Failing(), data())
    assert progress._bar is None


def test_progress_can_be_disabled(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = TrainingProgress(console=Console(file=stream))
    progress.disable()
    trainer(tmp_path, progress, max_steps=2, limit_val_batches=0).fit(Model(), data())
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("mode", "kept"), [("min", 6), ("max", 2)])
def test_best_checkpoint_keeps_the_best(tmp_path: Path, mode: Any, kept: int) -> None:
    best = BestCheckpoint(tmp_path, monitor="valid/loss", mode=mode)
    model = Model(valid=[5.0, math.nan, 1.0, 4.0])
    trainer(tmp_path, best, max_steps=8, val_check_interval=2).fit(model, data(), data(1))
    assert best.best == {"min": 1.0, "max": 5.0}[mode]
    content = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert content["global_step"] == kept


def test_best_checkpoint_remembers_over_a_resume(tmp_path: Path) -> None:
    def run(valid: list[float], steps: int, path: Path | None) -> None:
        callbacks = [BestCheckpoint(tmp_path, monitor="valid/loss"), Resumable(tmp_path, every_n_steps=2)]
        trainer(tmp_path, *callbacks, max_steps=steps, val_check_interval=2).fit(
            Model(valid=valid), data(), data(1), ckpt_path=path
        )

    run([3.0], 2, None)
    run([4.0], 4, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 2
    run([2.0], 6, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 6


def test_best_checkpoint_names_what_was_logged(tmp_path: Path) -> None:
    best = BestCheckpoint(tmp_path, monitor="valid/bleu")
    with pytest.raises(ValueError, match=r"got 'valid/bleu'. Logged were \['valid/loss'\]"):
        trainer(tmp_path, best, max_steps=2, val_check_interval=2).fit(Model(valid=[1.0]), data(), data(1))
    with pytest.raises(ValueError, match='must be "min" or "max"'):
        BestCheckpoint(tmp_path, monitor="x", mode="least")  # type: ignore[arg-type]


def test_last_checkpoint_by_minutes_and_at_the_end(tmp_path: Path) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.saved: dict[int, int] = {}

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if (tmp_path / "last.ckpt").exists():
                content = torch.load(tmp_path / "last.ckpt", weights_only=True)
                self.saved[trainer.global_step] = content["global_step"]

    clock, watch = Clock(), Watch()
    last = Resumable(tmp_path, every_n_minutes=0.5, clock=clock)
    trainer(tmp_path, watch, last, max_steps=8, limit_val_batches=0).fit(Model(clock), data())
    assert watch.saved == {3: 3, 4: 3, 5: 3, 6: 6, 7: 6}
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8


def test_resumable_refuses_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_steps must be positive or None: got 0"):
        Resumable(tmp_path, every_n_steps=0)
    run = trainer(tmp_path, Resumable(tmp_path), BestCheckpoint(tmp_path, monitor="valid/loss"), max_steps=1)
    with pytest.raises(ValueError, match="BestCheckpoint before Resumable"):
        run.fit(Model(), data(), data(1))


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_state_is_untouched_by_what_happens_between_batches(tmp_path: Path) -> None:
    class Drawing(Model):
        def __init__(self) -> None:
            super().__init__()
            self.drawn: list[tuple[float, float, float]] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.drawn.append(draw())
            return super().training_step(batch, index)

        def validation_step(self, batch: Any, index: int) -> None:
            draw()

    def run(**kwargs: Any) -> list[tuple[float, float, float]]:
        L.seed_everything(5, verbose=False)
        model = Drawing()
        valid = DataLoader(torch.randn(4, 4), shuffle=True)  # type: ignore[arg-type, var-annotated]
        trainer(tmp_path, RandomState(), max_steps=6, **kwargs).fit(model, data(), valid)
        return model.drawn

    plain = run(limit_val_batches=0)
    assert len(set(plain)) == 6
    assert run(val_check_interval=2) == plain


def test_random_state_goes_through_plain_data(tmp_path: Path) -> None:
    callback = RandomState()
    random.gauss(0, 1)  # leaves a second number behind, which is part of the state
    np.random.standard_normal()
    module, run = Model(), trainer(tmp_path)
    callback.on_train_batch_end(run, module, None, None, 0)
    expected = random.gauss(0, 1), np.random.standard_normal(), torch.randn(())
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    draw()
    other = RandomState()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.on_train_batch_start(run, module, None, 0)
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.randn(())) == expected
