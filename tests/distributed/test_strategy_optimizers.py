"""Optimizers under the Strategy: whenever they were made, whoever adds groups or clips, and of every class of torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from case_group import in_one_group
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.cli import LightningCLI
from small_lm import (
    CLIP,
    EXPERTS,
    FEW_LAYOUTS,
    GLOBAL_BATCH,
    MORE_LAYOUTS,
    STEPS,
    Sentences,
    SmallLM,
    alike,
    close,
    differences,
    fit,
    one_process,
    sentences,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from moekit import ExpertParallelStrategy
from moekit.errors import UserError
from moekit.testing import JoinedProcesses
from moekit.training.callbacks.expert_gradients import ScaleExpertGradients
from moekit.training.cli import StepCLI

DATA = sentences(3)


class Early(SmallLM):
    """Makes its optimizer in __init__, and may have trained alone before."""

    def __init__(self, steps: int = 0) -> None:
        super().__init__()
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "lr": 3e-2}]
        self.early = torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.early, 1, gamma=0.5)
        for ids in sentences(steps or 1, seed=9).split(GLOBAL_BATCH)[:steps]:
            self.early.zero_grad()
            self.loss(ids).backward()
            self.early.step()

    def configure_optimizers(self) -> Any:
        return {"optimizer": self.early, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}


def scheduled(module: Early) -> dict[str, Any]:
    """As one process, whose schedule moves with the steps."""
    module.early.register_step_post_hook(lambda *_: module.schedule.step())
    module.configure_optimizers = lambda: module.early  # type: ignore[method-assign]
    return one_process(module, DATA)


def made_before_the_model_is_divided() -> None:
    """In __init__, new or with state; groups, their settings and the schedule are kept."""
    for steps, layouts in ((0, FEW_LAYOUTS[:1]), (2, MORE_LAYOUTS)):
        expected = scheduled(Early(steps))
        for layout in layouts:
            module = Early(steps)
            if dist.get_rank():  # what counts is the first rank's, weights and state
                of_state = [t for state in module.early.state.values() for t in state.values()]
                for tensor in [*module.parameters(), *of_state]:
                    tensor.data.uniform_(1.0, 2.0)
            close(fit(module, ExpertParallelStrategy(**layout), DATA), expected)
            names = {id(p): n for n, p in module.named_parameters()}
            assert [group["lr"] for group in module.early.param_groups] == [1e-2 / 8, 3e-2 / 8]
            assert {names[id(p)] for g in module.early.param_groups for p in g["params"]} == set(names.values())
            assert {names[id(p)] for p in module.early.state} == set(names.values())


def two_fits_of_one_optimizer() -> None:
    """An optimizer that lives in the module goes on where it was, with a new Trainer."""
    expected = scheduled(Early())
    for layout in FEW_LAYOUTS:
        module = Early()
        fit(module, ExpertParallelStrategy(**layout), DATA[:GLOBAL_BATCH])
        fit(module, ExpertParallelStrategy(**layout), DATA[GLOBAL_BATCH:])
        alike(module, expected["weights"])


class Plain(SmallLM):
    """Without arguments, for a command line, and without an optimizer."""

    def __init__(self) -> None:
        super().__init__()

    configure_optimizers = L.LightningModule.configure_optimizers  # type: ignore[assignment]


class FiveSteps(Sentences):
    def __init__(self) -> None:
        super().__init__(sentences(STEPS))


def by_command_line() -> None:
    """LightningCLI and StepCLI make the optimizer before the Trainer runs; both end as one process does."""
    schedule = ["--lr_scheduler", "InverseSquareRoot", "--lr_scheduler.warmup", "2"]
    for cli, more, stages in ((LightningCLI, [], (0, 3)), (StepCLI, schedule, (1, 2))):
        plain: Any = SmallLM()
        plain.optimizer_of_one = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        if more:
            factors = torch.optim.lr_scheduler.LambdaLR(
                plain.optimizer_of_one, lambda n: (n + 1) / 2 if n < 2 else math.sqrt(2 / (n + 1))
            )
            plain.optimizer_of_one.register_step_post_hook(lambda *_, f=factors: f.step())
        plain.configure_optimizers = lambda p=plain: p.optimizer_of_one
        expected = one_process(plain, sentences(STEPS))["weights"]
        assert max(float((p - SmallLM().get_parameter(n)).abs().max()) for n, p in expected.items()) > 1e-2
        for stage in stages:
            command = ["fit", "--optimizer", "AdamW", "--optimizer.lr", "0.01", *more]
            command += ["--trainer.strategy", f"expert_parallel_zero{stage}"]
            made = cli(
                Plain,
                FiveSteps,
                args=command,
                save_config_callback=None,
                trainer_defaults={
                    "accelerator": "cpu", "devices": dist.get_world_size(), "plugins": [JoinedProcesses()],
                    "gradient_clip_val": CLIP, "max_epochs": 1, "limit_val_batches": 0, "logger": False,
                    "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
                },
            )  # fmt: skip
            assert made.trainer.strategy.meshes.layout.expert_parallel_size == 2  # type: ignore[attr-defined]
            alike(made.model, expected)
    assert [c for c in classes_of(Optimizer) if c.__name__ == "AdamW"] == [torch.optim.AdamW]


def classes_of(base: type) -> list[type]:
    return [kind for found in base.__subclasses__() for kind in (found, *classes_of(found))]


class Joins(L.Callback):
    """Gives the optimizer its experts in the second step, as they are now or as they were before the division."""

    def __init__(self, old: list[nn.Parameter] | None = None) -> None:
        self.old = old

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            new = [p for n, p in module.named_parameters() if "experts" in n]
            trainer.optimizers[0].add_param_group({"params": self.old or new, "lr": 3e-2})


class WithoutExperts(SmallLM):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([p for n, p in self.named_parameters() if "experts" not in n], lr=1e-2)


def groups_that_join_later() -> None:
    plain = WithoutExperts()
    optimizer = plain.configure_optimizers()
    for number, ids in enumerate(DATA.split(GLOBAL_BATCH)):
        if number == 1:
            optimizer.add_param_group(
                {"params": [p for n, p in plain.named_parameters() if "experts" in n], "lr": 3e-2}
            )
        optimizer.zero_grad()
        plain.loss(ids).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP)
        optimizer.step()
    for layout, before in (*zip(MORE_LAYOUTS, itertools.cycle((False, True))), (MORE_LAYOUTS[2], True)):
        module = WithoutExperts()
        old = [p for n, p in module.named_parameters() if "experts" in n] if before else None
        fit(module, ExpertParallelStrategy(**layout), DATA, callbacks=[Joins(old)])
        alike(module, plain)


class Makes(SmallLM):
    """Its optimizer is made by a function of all parameters."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Optimizer:
        return self.make(list(self.parameters()))


def every_optimizer_of_torch() -> None:
    """Each is right, or refused by name before the first step; layouts take turns."""
    turns = itertools.cycle(FEW_LAYOUTS)
    rates = {"SGD": 0.1, "ASGD": 0.1, "Adadelta": 1.0, "RMSprop": 1e-3, "RAdam": 1e-2}
    refused = {"LBFGS", "Rprop", "SparseAdam", "Adafactor"}
    kinds = [kind for kind in classes_of(Optimizer) if kind.__module__.startswith("torch.optim")]
    kinds = [kind for kind in kinds if kind.__name__ not in ("Muon", "_MultiTensorOptimizer")]
    assert {"Adagrad", "AdamW", "SGD", *refused} <= {kind.__name__ for kind in kinds}
    for kind in kinds:

        def make(parameters: list[nn.Parameter], kind: Any = kind) -> Optimizer:
            found: Optimizer = kind(parameters, lr=rates.get(kind.__name__, 1e-3))
            return found

        if kind.__name__ in refused:
            with pytest.raises(UserError, match=f"cannot train with torch.optim.{kind.__name__}: "):
                fit(Makes(make), ExpertParallelStrategy(2), DATA)
            continue
        layout = next(turns)
        found = differences(fit(Makes(make), ExpertParallelStrategy(**layout), DATA), one_process(Makes(make), DATA))
        assert max(found.values()) < 2e-6, (kind.__name__, layout, found)


class OwnClipping(SmallLM):
    """Clips with torch's function."""

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        self.norm = nn.utils.clip_grad_norm_(self.parameters(), CLIP, error_if_nonfinite=True)
        plain = nn.Parameter(torch.zeros(2))  # tensors of one process are clipped as ever meanwhile
        plain.grad = torch.tensor([3.0, 4.0])
        assert nn.utils.clip_grad_norm_([plain], 1.0) == 5.0
        torch.testing.assert_close(plain.grad, torch.tensor([0.6, 0.8]))


def clipping_by_torch() -> None:
    before = vars(nn.utils.clip_grad).copy()
    expected = one_process(SmallLM(), DATA)
    for layout in MORE_LAYOUTS:
        module = OwnClipping()
        got = fit(module, ExpertParallelStrategy(**layout), DATA)
        close(got, expected)
        assert float(module.norm) == pytest.approx(expected["norms"][-1], rel=1e-5)
    assert vars(nn.utils.clip_grad) == before  # nothing is left behind


class NaNInBackward(SmallLM):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (0 * self.temperature - 1).sqrt()


def anomaly_detection() -> None:
    """Autograd's search for NaN finds nothing in a healthy model, and names the function in a sick one."""
    expected = one_process(SmallLM(), DATA)
    for layout in FEW_LAYOUTS[1:]:
        close(fit(SmallLM(), ExpertParallelStrategy(**layout), DATA, detect_anomaly=True), expected)
    with pytest.raises(RuntimeError, match=r"SqrtBackward0.* returned nan"):
        fit(NaNInBackward(), ExpertParallelStrategy(2), DATA, detect_anomaly=True)


def larger_gradients_for_experts() -> None:
    """The callback finds the experts of every layout."""
    plain = SmallLM("sgd")
    optimizer = plain.configure_optimizers()
    for ids in DATA.split(GLOBAL_BATCH):
        optimizer.zero_grad()
        plain.loss(ids).backward()
        for name, p in plain.named_parameters():
            if "experts" in name:
                assert p.grad is not None
                p.grad.mul_(math.sqrt(EXPERTS))
        nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        optimizer.step()
    for layout in FEW_LAYOUTS:
        module = SmallLM("sgd")
        fit(module, ExpertParallelStrategy(**layout), DATA, callbacks=[ScaleExpertGradients()])
        alike(module, plain)


def what_would_train_nothing_is_refused() -> None:
    """Parameters that are not the model's, and callbacks that exchange parameters."""
    stranger = SmallLM()
    with pytest.raises(UserError, match=r"group 0 of AdamW has one of shape .* that is none of the model's"):
        fit(Makes(lambda _: torch.optim.AdamW(stranger.parameters())), ExpertParallelStrategy(2), DATA)
    joins = Joins([nn.Parameter(torch.zeros(3))])
    with pytest.raises(UserError, match=r"group 1 of AdamW has one of shape \(3,\)"):
        fit(WithoutExperts(), ExpertParallelStrategy(2), DATA, callbacks=[joins])
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.5)
    with pytest.raises(UserError, match="cannot train with ModelPruning"):
        fit(SmallLM(), ExpertParallelStrategy(2), DATA, callbacks=[pruning])


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    made_before_the_model_is_divided,
    two_fits_of_one_optimizer,
    by_command_line,
    groups_that_join_later,
    every_optimizer_of_torch,
    clipping_by_torch,
    anomaly_detection,
    larger_gradients_for_experts,
    what_would_train_nothing_is_refused,
)
