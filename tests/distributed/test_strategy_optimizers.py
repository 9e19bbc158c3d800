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
from case_group import folder, outcome_in, require_success
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from small_lm import (
    CLIP,
    EXPERTS,
    GLOBAL_BATCH,
    STEPS,
    Sentences,
    SmallLM,
    close,
    differences,
    fit,
    one_process,
    sentences,
    trainer_for,
    whole_weights,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from moekit import ExpertParallelStrategy
from moekit.errors import UserError
from moekit.testing import JoinedProcesses
from moekit.training.callbacks.expert_gradients import ScaleExpertGradients
from moekit.training.cli import StepCLI
from moekit.training.optimizers import scale_expert_gradients

DATA = sentences(3)
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"expert_parallel_size": 2, "zero_stage": 0},
    {"expert_parallel_size": 1, "zero_stage": 1},
    {"expert_parallel_size": 2, "zero_stage": 3},
    {"expert_parallel_size": 1, "tensor_parallel_size": 2, "zero_stage": 1},
    {"expert_parallel_size": 1, "zero_stage": 2, "offload": "optimizer"},
)
FEW = (LAYOUTS[1], LAYOUTS[2], LAYOUTS[4])


def alike(value: Tensor, expected: Tensor, name: str) -> None:
    """As in `close`, by the norm: the first step of Adam makes a whole one of a rounding error's sign."""
    assert float((value - expected).norm() / expected.norm()) < 1e-5, name


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
    for steps, layouts in ((0, FEW), (2, LAYOUTS)):
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


class OneOfTwo(SmallLM):
    """Steps by hand with two optimizers, of which one was there before."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.optim.SGD([p for n, p in self.named_parameters() if "experts" in n], lr=0.1)

    def configure_optimizers(self) -> Any:
        return [self.first, torch.optim.AdamW([p for n, p in self.named_parameters() if "experts" not in n], lr=1e-2)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()


def one_of_two_made_before() -> None:
    plain = OneOfTwo()
    optimizers = plain.configure_optimizers()
    for ids in DATA.split(GLOBAL_BATCH):
        plain.loss(ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for layout in FEW:
        module = OneOfTwo()
        fit(module, ExpertParallelStrategy(**layout), DATA, gradient_clip_val=None)
        for name, value in whole_weights(module).items():
            alike(value, plain.get_parameter(name), name)


class SeveralPasses(SmallLM):
    """Goes forward and backward once for each of two optimizers, as adversarial training does, and looks between."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        experts = [p for n, p in self.named_parameters() if "experts" in n]
        others = [p for n, p in self.named_parameters() if "experts" not in n]
        return [torch.optim.SGD(experts, lr=0.1), torch.optim.AdamW(others, lr=1e-2)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            self.losses.append(loss.detach())
            self.manual_backward(loss)
            with torch.no_grad():
                self.loss(batch)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


def several_passes_in_a_step() -> None:
    """What a backward let go of is gathered again, with the weights of after the step, and toggled as they are."""
    plain = SeveralPasses()
    optimizers = plain.configure_optimizers()
    losses = []
    for ids in DATA.split(GLOBAL_BATCH):
        for optimizer in optimizers:
            plain.zero_grad()
            loss = plain.loss(ids)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
    for layout in LAYOUTS:
        module = SeveralPasses()
        found = fit(module, ExpertParallelStrategy(**layout), DATA, gradient_clip_val=None)
        assert found["losses"] == pytest.approx(losses, rel=1e-5), layout
        for name, value in found["weights"].items():
            alike(value, plain.get_parameter(name), name)


class TwoLosses(SmallLM):
    """Two graphs stand before the first backward, one of which goes backward twice."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        one, other = self.loss(batch), self.loss(batch.flip(1))
        self.losses.append(one.detach())
        self.manual_backward(one, retain_graph=True)
        self.manual_backward(other)
        self.manual_backward(one.square())
        optimizer.step()
        optimizer.zero_grad()


def several_backwards_in_a_step() -> None:
    """Every backward has the weights that its forward had."""
    plain = TwoLosses()
    optimizer = plain.configure_optimizers()
    for ids in DATA.split(GLOBAL_BATCH // 2):  # a square of a mean is none of means: ranks take turns, not parts
        one, other = plain.loss(ids), plain.loss(ids.flip(1))
        (one + one.square() + other).backward()
        optimizer.step()
        optimizer.zero_grad()
    for layout in LAYOUTS:
        module = TwoLosses()
        ids = DATA.view(-1, GLOBAL_BATCH // 2, DATA.shape[1])
        both = ids.repeat_interleave(2, 1)  # the sampler deals rows out in turn, so both ranks read the same
        fit(module, ExpertParallelStrategy(**layout), both.flatten(0, 1), gradient_clip_val=None)
        for name, value in whole_weights(module).items():
            alike(value, plain.get_parameter(name), name)


def two_fits_of_one_optimizer() -> None:
    """An optimizer that lives in the module goes on where it was, with a new Trainer."""
    expected = scheduled(Early())
    for layout in FEW:
        module = Early()
        fit(module, ExpertParallelStrategy(**layout), DATA[:GLOBAL_BATCH])
        fit(module, ExpertParallelStrategy(**layout), DATA[GLOBAL_BATCH:])
        for name, value in whole_weights(module).items():
            alike(value, expected["weights"][name], name)


class Plain(SmallLM):
    """Without arguments, for a command line, and without an optimizer."""

    def __init__(self) -> None:
        super().__init__()

    configure_optimizers = L.LightningModule.configure_optimizers  # type: ignore[assignment]


class FiveSteps(Sentences):
    def __init__(self) -> None:
        super().__init__(sentences(STEPS))


def by_command_line() -> None:
    """LightningCLI and StepCLI make the optimizer before the Trainer runs; every stage ends as one process does."""
    schedule = ["--lr_scheduler", "InverseSquareRoot", "--lr_scheduler.warmup", "2"]
    for cli, more in ((LightningCLI, []), (StepCLI, schedule)):
        plain: Any = SmallLM()
        plain.optimizer_of_one = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        if more:
            factors = torch.optim.lr_scheduler.LambdaLR(
                plain.optimizer_of_one, lambda n: (n + 1) / 2 if n < 2 else math.sqrt(2 / (n + 1))
            )
            plain.optimizer_of_one.register_step_post_hook(lambda *_, f=factors: f.step())
        plain.configure_optimizers = lambda p=plain: p.optimizer_of_one
        expected = one_process(plain, sentences(STEPS))["weights"]
        for stage in range(4):
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
            found = whole_weights(made.model)
            moved = 0.0
            for name, value in found.items():
                alike(value, expected[name], name)
                moved = max(moved, float((value - SmallLM().get_parameter(name)).abs().max()))
            assert moved > 1e-3
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
    for layout in LAYOUTS:
        for before in (False, True) if layout in FEW else (False,):
            module = WithoutExperts()
            old = [p for n, p in module.named_parameters() if "experts" in n] if before else None
            fit(module, ExpertParallelStrategy(**layout), DATA, callbacks=[Joins(old)])
            for name, value in whole_weights(module).items():
                alike(value, plain.get_parameter(name), name)


class Backbone(SmallLM):
    """Trains what requires a gradient; its backbone is the decoder."""

    @property
    def backbone(self) -> nn.Module:
        return self.model.decoder

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


class Unfreezes(BaseFinetuning):
    """Experts train from the second epoch on."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.model.decoder.layers[1])

    def finetune_function(self, module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.model.decoder.layers[1], optimizer)


class AllSentences(L.LightningDataModule):
    """For the one process that the others are compared with."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(DATA, batch_size=GLOBAL_BATCH)  # type: ignore[arg-type]


def by_plain_lightning(module: L.LightningModule, callback: L.Callback, epochs: int, **options: Any) -> Any:
    """One process, Lightning's own strategy. Each rank does the same, so collectives of the router agree."""
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, gradient_clip_val=CLIP, logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
        **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=AllSentences())
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def fine_tuning_callbacks() -> None:
    """BaseFinetuning and BackboneFinetuning end as they do in plain Lightning."""
    for make in (Unfreezes, lambda: BackboneFinetuning(1, backbone_initial_lr=1e-3, verbose=False)):
        expected = by_plain_lightning(Backbone(), make(), 3)
        for layout in FEW:
            module = Backbone()
            fit(module, ExpertParallelStrategy(**layout), DATA, max_epochs=3, callbacks=[make()])
            for name, value in whole_weights(module).items():
                alike(value, expected[name], name)


def fine_tuning_is_resumed() -> None:
    """A checkpoint from after the unfreezing gives the optimizer its groups back."""
    for layout in FEW:
        place = folder()

        def train(epochs: int, path: Any = None, saver: Any = None, layout: Any = layout) -> Any:
            module = Backbone()
            callbacks = [Unfreezes(), *([saver] if saver else [])]
            trainer = trainer_for(
                ExpertParallelStrategy(**layout),
                callbacks=callbacks,
                max_epochs=epochs,
                enable_checkpointing=bool(saver),
            )
            trainer.fit(module, datamodule=Sentences(DATA), ckpt_path=path)
            return trainer, module

        train(2, saver=ModelCheckpoint(place, filename="{epoch}"))
        dist.barrier()
        trainer, _ = train(3, path=place / "epoch=1.ckpt")
        groups = trainer.optimizers[0].param_groups
        assert [group["lr"] for group in groups] == pytest.approx([1e-2 * 0.9**3, 1e-2 * 0.9 / 10 * 0.9**2])
        assert len(trainer.optimizers[0].state) == sum(len(group["params"]) for group in groups)


def stochastic_weight_averaging() -> None:
    expected = by_plain_lightning(SmallLM("sgd"), StochasticWeightAveraging(1e-2, swa_epoch_start=1), 3)
    for layout in FEW:
        module = SmallLM("sgd")
        callback = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
        fit(module, ExpertParallelStrategy(**layout), DATA, max_epochs=3, callbacks=[callback])
        for name, value in whole_weights(module).items():
            alike(value, expected[name], name)


class OwnAverage(SmallLM):
    """Keeps an average of its model in a submodule, by torch's class."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.model, avg_fn=get_ema_avg_fn(0.6))

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([*self.model.parameters(), self.temperature], lr=1e-2)

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update_parameters(self.model)


def an_average_in_a_submodule() -> None:
    plain = OwnAverage()
    optimizer = plain.configure_optimizers()
    for ids in DATA.split(GLOBAL_BATCH):
        optimizer.zero_grad()
        plain.loss(ids).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        optimizer.step()
        plain.average.update_parameters(plain.model)
    for layout in FEW:
        module = OwnAverage()
        fit(module, ExpertParallelStrategy(**layout), DATA)
        for name, value in whole_weights(module).items():
            alike(value, plain.get_parameter(name), name)


class Makes(SmallLM):
    """Its optimizer is made by a function of all parameters."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Optimizer:
        return self.make(list(self.parameters()))


def every_optimizer_of_torch() -> None:
    """Each is right, or refused by name before the first step; layouts take turns."""
    turns = itertools.cycle(FEW)
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


class ByMuon(SmallLM):
    """Matrices by Muon, all else by AdamW, by hand."""

    automatic_optimization = False
    training_step = OneOfTwo.training_step  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        # What has two dimensions in a bank is a vector for each expert.
        matrices = [p for n, p in self.named_parameters() if p.ndim == 2 and "experts" not in n]
        others = [p for n, p in self.named_parameters() if p.ndim != 2 or "experts" in n]
        return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]


def muon_needs_whole_matrices() -> None:
    plain = ByMuon()
    optimizers = plain.configure_optimizers()
    for ids in DATA.split(GLOBAL_BATCH):
        plain.loss(ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for layout in LAYOUTS:
        if layout["zero_stage"] == 0:
            module = ByMuon()
            fit(module, ExpertParallelStrategy(**layout), DATA, gradient_clip_val=None)
            for name, value in whole_weights(module).items():
                alike(value, plain.get_parameter(name), name)
        else:
            with pytest.raises(UserError, match=r"Muon must see whole matrices: .*zero_stage=0"):
                fit(ByMuon(), ExpertParallelStrategy(**layout), DATA, gradient_clip_val=None)


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
    for layout in LAYOUTS:
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
    for layout in FEW:
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
    for layout in FEW:
        module = SmallLM("sgd")
        fit(module, ExpertParallelStrategy(**layout), DATA, callbacks=[ScaleExpertGradients()])
        for name, value in whole_weights(module).items():
            alike(value, plain.get_parameter(name), name)
    assert callable(scale_expert_gradients)


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


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        made_before_the_model_is_divided,
        one_of_two_made_before,
        several_passes_in_a_step,
        several_backwards_in_a_step,
        two_fits_of_one_optimizer,
        by_command_line,
        groups_that_join_later,
        fine_tuning_callbacks,
        fine_tuning_is_resumed,
        stochastic_weight_averaging,
        an_average_in_a_submodule,
        every_optimizer_of_torch,
        muon_needs_whole_matrices,
        clipping_by_torch,
        anomaly_detection,
        larger_gradients_for_experts,
        what_would_train_nothing_is_refused,
    )
}

outcome = outcome_in(__name__, 2, at_once=3)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, outcome: list[dict[str, str]]) -> None:
    require_success(name, outcome)
