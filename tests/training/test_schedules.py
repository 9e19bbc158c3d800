"""Learning rates against their formulas."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from moekit.training.budget import Budget
from moekit.training.cli import StepCLI
from moekit.training.schedules import ConstantRate, Cosine, InverseSquareRoot, per_step


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def rates(schedule: LRScheduler, steps: int) -> list[list[float]]:
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return seen


def test_inverse_square_root() -> None:
    seen = rates(InverseSquareRoot(optimizer(2.0, 6.0), warmup=4), 100)
    for step, (first, second) in enumerate(seen):
        number = step + 1
        expected = 2.0 * min(number / 4, math.sqrt(4 / number))
        assert first == pytest.approx(expected)
        assert second == pytest.approx(3 * expected)  # a multiplier of a group stays


def test_inverse_square_root_without_warmup() -> None:
    seen = rates(InverseSquareRoot(optimizer(1.0), warmup=0), 5)
    assert [x for (x,) in seen] == pytest.approx([(n + 1) ** -0.5 for n in range(5)])


def test_cosine() -> None:
    seen = [x for (x,) in rates(Cosine(optimizer(3.0), 40, warmup=10, minimum=0.1), 45)]
    for step in range(10):
        assert seen[step] == pytest.approx(3.0 * (step + 1) / 10)
    for step in range(10, 40):
        p = (step - 10) / 30
        assert seen[step] == pytest.approx(3.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * p))))
    assert seen[10] == pytest.approx(3.0)
    assert seen[40:] == pytest.approx([0.3] * 5)  # past the end it stays


def test_constant() -> None:
    assert [x for (x,) in rates(ConstantRate(optimizer(2.0), warmup=2), 5)] == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_cosine_follows_the_minutes_from_the_end_of_the_warmup() -> None:
    budget = Budget(max_minutes=10)
    schedule = Cosine(optimizer(1.0), budget, warmup=2)
    seen = []
    for minutes in (0.5, 2.0, 4.0, 6.0, 10.0, 11.0):
        seen.append(schedule.optimizer.param_groups[0]["lr"])
        budget.seconds = 60 * minutes
        schedule.optimizer.step()
        schedule.step()
    seen.append(schedule.optimizer.param_groups[0]["lr"])
    # The warm-up ends with 2 minutes used; 4, 6, 10 minutes are 1/4, 1/2 and all of the rest.
    cosine = [(1 + math.cos(math.pi * p)) / 2 for p in (0.25, 0.5, 1.0, 1.0)]
    assert seen == pytest.approx([0.5, 1.0, 1.0, *cosine])


def test_budget_is_spent_by_whichever_limit_comes_first() -> None:
    budget = Budget(max_steps=100, max_minutes=2, seconds=30)
    assert budget.fraction(10) == 0.25
    assert budget.fraction(60) == 0.6
    assert budget.fraction(500) == 1.0
    assert not budget.out_of_time
    budget.seconds = 120
    assert budget.out_of_time
    assert not Budget(max_steps=1, seconds=1e9).out_of_time


@pytest.mark.parametrize("minutes", [None, 10.0])
def test_resumed_schedule_goes_on_exactly(minutes: float | None) -> None:
    def make() -> Cosine:
        return Cosine(optimizer(1.0), Budget(max_steps=20, max_minutes=minutes, seconds=30), warmup=3, minimum=0.05)

    whole = make()
    expected = rates(whole, 20)
    first = make()
    assert rates(first, 8) == expected[:8]
    state = first.state_dict()
    assert all(isinstance(v, int | float | list | None) for v in state.values())
    second = make()
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(state)
    assert rates(second, 12) == expected[8:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(optimizer(1.0), 10, warmup=10), "shorter than the run: got 10 of 10"),
        (lambda: Cosine(optimizer(1.0), 10, minimum=2.0), "in 0..1: got 2.0"),
        (lambda: ConstantRate(optimizer(1.0), warmup=-1), "0 or more: got -1"),
        (lambda: Budget(), "got neither"),
        (lambda: Budget(max_minutes=0), "max_minutes must be positive"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


class OnlyTraining(BoringModel):
    """BoringModel without validation and without its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(RandomDataset(32, 6))

    val_dataloader = None
    validation_step = None
    configure_optimizers = L.LightningModule.configure_optimizers


QUIET = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_lightning_cli_moves_schedules_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "train.py",
        "fit",
        "--seed_everything=1",
        "--optimizer=SGD",
        "--optimizer.lr=1.0",
        "--lr_scheduler=moekit.training.schedules.Cosine",
        "--lr_scheduler.budget=6",
        "--lr_scheduler.warmup=2",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    cli = StepCLI(OnlyTraining, trainer_defaults=QUIET, save_config_callback=None)
    cosine = [(1 + math.cos(math.pi * p / 4)) / 2 for p in range(4)]
    assert cli.model.rates == pytest.approx([0.5, 1.0, *cosine])


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_per_step_moves_once_per_optimizer_step_under_accumulation() -> None:
    class Model(OnlyTraining):
        def configure_optimizers(self) -> object:  # type: ignore[override]
            optim = torch.optim.SGD(self.parameters(), 1.0)
            return per_step(optim, InverseSquareRoot(optim, warmup=2))

    model = Model()
    L.Trainer(**QUIET, accumulate_grad_batches=3).fit(model)  # type: ignore[arg-type]
    assert model.rates == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
