"""What is wrong in training is said, logged and kept; spikes are left out or end it, on all processes alike."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

import moekit as mk
from moekit.errors import TrainingStoppedError
from moekit.routers import DenseToSparseRouter, ExponentialDecay
from moekit.routing import Capacity
from moekit.testing import run_distributed
from moekit.testing.distributed import JoinedProcesses
from moekit.training import MonitorWarning, RoutingMonitor, Thresholds, TrainingWatch
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.non_finite import NonFinite
from moekit.training.callbacks.progress import TrainingProgress
from moekit.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from moekit.training.metrics import RoutingStatistics
from moekit.training.monitoring.rules import LayerFigures, Said, troubles, unweighed
from moekit.training.monitoring.spikes import Spikes

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
E, D = 4, 8
SHORT = Thresholds(window=10)
QUIET = Thresholds(window=10, max_drop_rate=1.0)


class Model(L.LightningModule):
    """A sparse layer of four experts; `scores` of the experts are added for every token. Its data are by number."""

    def __init__(
        self, scores: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0), *, weigh: bool = True,
        loss: dict[int, float] | None = None, gradient: dict[int, float] | None = None, rank: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(0)
        router = mk.routers.TopKRouter(D, E, 1, capacity=Capacity(2.0, None))
        self.moe = mk.MoELayer(router, mk.experts.GroupedMLP(E, D, 16))
        self.out = nn.Linear(D, 1)
        with torch.no_grad():
            router.weight[:, 0] = torch.tensor(scores)
        self.aux = mk.AuxLosses(load_balance=0.01 if weigh else 0.0)
        self.boost, self.pull, self.only = loss or {}, gradient or {}, rank
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        batch = batches(1, number + 1000 * self.global_rank)[0]  # that of the step, also where the loader begins anew
        here = self.only is None or self.global_rank == self.only
        hidden, routing = self.moe(batch)
        loss = (self.out(hidden) - batch.sum(-1, keepdim=True)).square().mean() + self.aux(routing)[0]
        if number in self.pull and here:
            factor = self.pull[number]
            loss = loss * factor - (loss * (factor - 1)).detach()  # the value stays
        return loss * (self.boost.get(number, 1.0) if here else 1.0)

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append({name: _local(value.detach()).clone() for name, value in self.named_parameters()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches(steps: int, first: int = 0) -> list[Tensor]:
    found = []
    for number in range(first, first + steps):
        batch = torch.randn(32, D, generator=torch.Generator().manual_seed(number))
        batch[:, 0] = 1.0
        found.append(batch)
    return found


def fit(model: L.LightningModule, *callbacks: Any, steps: int = 40, **options: Any) -> L.Trainer:
    path = options.pop("ckpt_path", None)
    options = {
        "logger": False, "max_steps": steps // options.get("accumulate_grad_batches", 1),
        "enable_checkpointing": any(isinstance(c, Resumable) for c in callbacks), **options,
    }  # fmt: skip
    strategy = options.get("strategy", "auto")
    plugins = [*options.pop("plugins", []), *([AtomicCheckpointIO()] if isinstance(strategy, str) else [])]
    trainer = L.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
        callbacks=list(callbacks), plugins=plugins, use_distributed_sampler=False, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MonitorWarning)
        trainer.fit(model, torch.utils.data.DataLoader(batches(steps), batch_size=None), ckpt_path=path)  # type: ignore[arg-type]
    return trainer


def kinds(monitor: RoutingMonitor) -> list[tuple[int, str]]:
    return [(one.step, one.kind) for one in monitor.warned]


# -- each trouble is seen ----------------------------------------------------------------------------------------------


def test_a_healthy_run_is_told_nothing() -> None:
    said: list[str] = []
    monitor = RoutingMonitor(SHORT, say=said.append)
    fit(Model(), monitor, steps=60)
    assert said == []
    assert kinds(monitor) == []


def test_a_router_that_does_without_a_balance_loss_is_told_nothing_of_it() -> None:
    model = Model(weigh=False)
    model.moe.router = DenseToSparseRouter(D, E, ExponentialDecay(2.0, 0.5, 30), hard_from=30)
    monitor = RoutingMonitor(Thresholds(window=10, max_load=E, min_evenness=0.0, dead_share=0.0))
    fit(model, monitor, steps=40)
    assert "load_balance" in model.moe(batches(1)[0]).routing.losses, "which others are told of"
    assert kinds(monitor) == []


def test_a_layer_that_routed_nothing_has_no_figures_of_routing() -> None:
    """As adopted layers that were left in evaluation: zeros would read as a collapse."""

    class Evaluated(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.moe.eval()

    monitor = RoutingMonitor(SHORT, say=lambda _: None)
    fit(Evaluated(), monitor, steps=10)
    assert monitor.watch is not None
    assert {name for name in monitor.watch.values if "routing" in name} <= {
        "routing/moe/expert_gradient_norm", "routing/moe/expert_gradient_max_ratio"
    }  # fmt: skip


CASES: dict[str, tuple[dict[str, Any], list[tuple[int, str]], list[str]]] = {
    "dead": (
        {"scores": (0.0, 0.0, 0.0, -9.0)}, [(10, "dead")],
        ["moe: 1 of 4 experts is dead (3): each got under 0.01 of a fair share over the last 10 steps. Raise"],
    ),
    "collapse": (
        {"scores": (0.0, 9.0, 0.0, 0.0)}, [(10, "dead"), (10, "collapse"), (20, "drops")],
        [
            "moe: 3 of 4 experts are dead (0, 2, 3)",
            "moe: routing has collapsed: expert 1 of 4 got 4.00 fair shares (threshold 2.4), evenness of the load 0.00"
            " (threshold: below 0.5)",
            "moe: 50.0% of the assignments were dropped over the last 10 steps (threshold 0.1)",
        ],
    ),
    "logits": ({"scores": (70.0, 70.0, 70.0, 70.0)}, [(10, "logits")], ["moe: the router's logits are large: mean"]),
    "balance_loss": (
        {"weigh": False}, [(5, "balance_loss")],
        [
            "moe: the router returns a balance loss (load_balance) that weighs nothing: its gradient was 0",
            "Add moekit.AuxLosses(load_balance=0.01) of the routings to the loss; recipes have --model.load_balance",
        ],
    ),
    "loss_spike": (
        {"loss": {27: 50.0}}, [(28, "loss_spike"), (28, "gradient_spike")],
        ["of step 28 is a spike: above", "the last 27 steps and 10 times"],
    ),
    "gradient_spike": ({"gradient": {27: 50.0}}, [(28, "gradient_spike")], ["gradient norm "]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_once_logged_and_kept(case: str, tmp_path: Path) -> None:
    given, wanted, texts = CASES[case]
    said: list[str] = []
    file = tmp_path / "run" / "warnings.json"
    file.parent.mkdir()
    monitor = RoutingMonitor(SHORT, file=file, say=said.append)
    fit(Model(**given), monitor, logger=CSVLogger(tmp_path, version=""))
    assert kinds(monitor) == wanted
    assert len(said) == len(wanted)
    assert all(any(text in line for line in said) for text in texts), said
    kept = json.loads(file.read_text())["warnings"]
    assert [(one["step"], one["kind"], one["text"]) for one in kept] == [
        (one.step, one.kind, one.text) for one in monitor.warned
    ]
    rows = (tmp_path / "lightning_logs" / "metrics.csv").read_text().splitlines()
    found = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    dead, most = {"dead": (1, None), "collapse": (3, 4.0)}.get(case, (0, None))
    assert float(found["train/routing/dead_experts"]) == float(found["train/routing/moe/dead_experts"]) == dead
    assert most is None or float(found["train/routing/moe/load_max_ratio"]) == most
    assert float(found["train/routing/moe/expert_gradient_norm"]) > 0
    assert (float(found["train/routing/moe/logsumexp"]) > 50) == (case == "logits")
    assert float(found.get("train/warnings", 0)) == len(wanted)


def test_without_anybody_to_say_it_is_a_warning_and_the_bar_shows_it() -> None:
    monitor, progress = RoutingMonitor(QUIET), TrainingProgress(line_seconds=1e9)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=12, logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[monitor, progress], log_every_n_steps=5,
    )  # fmt: skip
    text: Any = torch.utils.data.DataLoader(batches(12), batch_size=None)  # type: ignore[arg-type]
    with pytest.warns(MonitorWarning, match="step 10: moe: 1 of 4 experts is dead"):
        trainer.fit(Model(scores=(0.0, 0.0, 0.0, -9.0)), text)
    assert monitor.text().startswith("1 dead  busiest 1.")
    assert monitor.text() in progress.training_text(trainer)
    assert trainer.progress_bar_metrics["dead_experts"] == 1


def test_it_is_said_again_after_it_went_away() -> None:
    said = Said()
    seen = [said.see(step, "dead", "a", "x" if there else None, 10) for step, there in
            [(5, True), (10, True), (15, False), (20, True), (25, False), (31, False), (35, True)]]  # fmt: skip
    assert [one.step for one in seen if one is not None] == [5, 35]
    assert said.see(35, "dead", "b", "y", 10) is not None, "of another layer"
    other = Said()
    other.load(copy.deepcopy(said.state()))
    assert other.see(36, "dead", "a", "x", 10) is None
    assert other.warned == said.warned


def test_names_that_the_module_logs_are_its_own() -> None:
    class Logs(Model):
        def __init__(self) -> None:
            super().__init__()
            self.train_routing = RoutingStatistics({"moe": E})

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            self.log("train/routing/drop_rate", 0.75)
            return super().training_step(batch, number)

    trainer = fit(Logs(), RoutingMonitor(SHORT), steps=10)
    assert trainer.callback_metrics["train/routing/drop_rate"] == 0.75
    assert "train/routing/moe/load_max_ratio" in trainer.callback_metrics
    assert "train/routing/moe/drop_rate" not in trainer.callback_metrics


# -- figures and rules against the obvious -----------------------------------------------------------------------------


def test_counts_are_those_of_every_training_batch_once() -> None:
    """Micro-batches, recomputed forwards, and others in evaluation, against what the layer returned."""
    torch.manual_seed(1)
    layer = mk.MoELayer(mk.routers.TopKRouter(D, E, 2, capacity=Capacity(1.0, None)), mk.experts.GroupedMLP(E, D, 16))
    watch, plain = TrainingWatch(layer, every=3), RoutingStatistics({"layer": E})
    routings: list[Any] = []
    layer.register_forward_hook(lambda *given: routings.append(given[2].routing) if torch.is_grad_enabled() else None)
    for step in (1, 2, 3):
        for _ in range(2):
            x = torch.randn(11, D, requires_grad=True)
            recomputed(lambda y: layer(y).hidden, x, use_reentrant=False).sum().backward()  # type: ignore[no-untyped-call]
            plain.update({"layer": routings[0]})
            routings.clear()
        layer.eval()
        layer(x)
        layer.train()
        routings.clear()
        watch.before_step(step, None)
        watch.after_step(step)
    wanted = {name: value for name, value in plain.log_values().items()}
    assert {name: watch.values[name] for name in wanted} == pytest.approx(wanted)
    norms = torch.cat([p.grad.flatten(1) for p in layer.experts.parameters() if p.grad is not None], 1).norm(dim=1)
    assert watch.values["routing/layer/expert_gradient_norm"] == pytest.approx(float(norms.norm()), rel=1e-5)
    assert watch.values["routing/layer/expert_gradient_max_ratio"] == pytest.approx(
        float(norms.max() / norms.mean()), rel=1e-5
    )
    watch.close()
    assert not layer._forward_hooks or len(layer._forward_hooks) == 1


def test_spikes_are_above_median_and_spread_and_all_before() -> None:
    generator = torch.Generator().manual_seed(3)
    noise = (3 + torch.randn(300, generator=generator)).abs().tolist()
    values = [5.0, *noise[:60], 30.0, math.nan, math.inf, 30.0, 3.0, *noise[60:90], 30.0, 33.0, 40.0, *noise[90:], 30.0]
    rule, past, found, wanted = Spikes(6.0, 40, 0.1), [], [], []
    for value in values:
        found.append(rule.see(value) is not None)
        recent, all_kept = past[-40:], past[-80:]
        middle = statistics.median(recent) if recent else 0.0
        spread = max(1.4826 * statistics.median([abs(v - middle) for v in recent]), 0.1 * middle) if recent else 0.0
        above = all(value > v + spread for v in all_kept[:-9])
        wanted.append(len(recent) >= 20 and math.isfinite(value) and value > middle + 6 * spread and above)
        past += [value] if math.isfinite(value) else []
    assert found == wanted
    seen = [value for value, is_spike in zip(values, found, strict=True) if is_spike]
    assert seen == [30.0, 30.0, 33.0, 40.0, 30.0], "30 is one again when nothing like it was seen for 80 steps"


@pytest.mark.parametrize("height", [9.0, 1e9])
def test_a_level_that_stays_is_no_spike_after_ten_steps(height: float) -> None:
    level = Spikes(6.0, 40, 0.1)
    assert [level.see(1.0) for _ in range(40)][-1] is None
    judged = [level.see(height) is not None for _ in range(40)]
    assert judged == [True] * 10 + [False] * 30


def test_seldom_batches_of_other_text_are_spikes_once() -> None:
    """Two kinds of text, one batch in fifty of the second, at twice the loss of the first, while both are learnt."""
    generator = torch.Generator().manual_seed(0)
    rule, found = Spikes(6.0, 100, 0.1), []
    for step in range(2000):
        level = 1 + 3 * math.exp(-step / 300)
        noise = 1 + 0.02 * float(torch.randn((), generator=generator))
        spike = rule.see(level * noise * (2.0 if step % 50 == 25 else 1.0))
        found += [step] if spike is not None else []
    assert found in ([25], [75]), "the first one that can be judged, and no other"
    spike = rule.see(100.0)
    assert spike is not None
    assert spike.largest is not None
    assert spike.bound == spike.largest + spike.spread


@pytest.mark.parametrize(
    ("load", "k", "wanted"),
    [
        ((0.5, 0.5, 0.0, 0.0), 2.0, {"dead", "collapse"}),  # every token to the same two of four
        ((0.25, 0.25, 0.25, 0.25), 2.0, set()),
        ((0.55, 0.15, 0.15, 0.15), 1.0, set()),
        ((0.7, 0.1, 0.1, 0.1), 1.0, {"collapse"}),
        ((1.0,), 1.0, set()),
        ((0.5, 0.5), 2.0, set()),
        ((0.79, 0.21), 1.0, set()),
        ((0.85, 0.15), 1.0, {"collapse"}),
        ((0.0, 0.0), 1.0, set()),  # nothing was routed
    ],
)
def test_a_layer_is_judged_by_what_it_can_be(load: tuple[float, ...], k: float, wanted: set[str]) -> None:
    layer = LayerFigures("x", load, True, k, 0.0, None, None, (), None)
    assert {kind for kind, _ in troubles(layer, Thresholds())} == wanted
    fixed = LayerFigures("x", load, False, k, 0.0, None, None, (), None)
    assert not list(troubles(fixed, Thresholds())), "a rule that nobody trains is not at fault"


# -- leaving out and stopping ------------------------------------------------------------------------------------------


def changed(model: Model) -> list[int]:
    """Numbers of the steps, from 2, that changed a weight."""
    pairs = zip(model.seen, model.seen[1:], strict=False)
    return [n for n, (a, b) in enumerate(pairs, start=2) if any(not torch.equal(a[name], b[name]) for name in a)]


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_skip_leaves_weights_and_optimizer_alone(options: dict[str, Any]) -> None:
    accumulate = options.get("accumulate_grad_batches", 1)
    watch = NonFinite() if accumulate == 1 else None
    model, monitor = Model(loss={27 * accumulate: 90.0}), RoutingMonitor(QUIET, on_spike="skip")
    trainer = fit(model, *([watch] if watch else []), monitor, steps=40 * accumulate, **options)
    assert monitor.watch is not None
    assert monitor.watch.skipped == 1
    stepped = changed(model)
    ends = [n for n in range(2, 40 * accumulate + 1) if n % accumulate == 0]
    assert stepped == [n for n in ends if n != 28 * accumulate]
    assert all(int(state["step"]) == 39 for state in trainer.optimizers[0].state.values())
    assert trainer.callback_metrics["train/spikes_skipped"] == 1
    assert "The step was left out; so were 1 in all." in monitor.warned[0].text


def test_numbers_are_not_changed() -> None:
    with_it, without = Model(), Model()
    fit(with_it, NonFinite(), RoutingMonitor(QUIET, on_spike="skip"), gradient_clip_val=0.1)
    fit(without, NonFinite(), gradient_clip_val=0.1)
    assert all(torch.equal(with_it.seen[-1][name], without.seen[-1][name]) for name in with_it.seen[-1])


@pytest.mark.parametrize("case", ["spike", "dead", "collapse"])
def test_stop_ends_training_in_order(case: str, tmp_path: Path) -> None:
    given, reaction, step = {
        "spike": ({"loss": {27: 90.0}}, {"on_spike": "stop"}, 28),
        "dead": ({"scores": (0.0, 0.0, 0.0, -9.0)}, {"on_dead": "stop"}, 10),
        "collapse": ({"scores": (0.0, 9.0, 0.0, 0.0)}, {"on_collapse": "stop"}, 10),
    }[case]
    model, monitor = Model(**given), RoutingMonitor(SHORT, **reaction)  # type: ignore[arg-type]
    with pytest.raises(TrainingStoppedError, match=f"training stopped after step {step}: ") as caught:
        fit(model, monitor, Resumable(tmp_path))
    assert f"The last good checkpoint is {tmp_path / 'last.ckpt'}." in str(caught.value)
    saved = load_checkpoint(tmp_path / "last.ckpt")
    assert saved["global_step"] == step
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in model.seen[-1].items())
    if case == "spike":
        assert step not in changed(model)


def test_skip_ends_after_ten_in_a_row() -> None:
    model = Model(loss={n: 40.0 * n for n in range(25, 60)})
    with pytest.raises(TrainingStoppedError, match="10 steps in a row were spikes and were left out, the last is 35"):
        fit(model, RoutingMonitor(QUIET, on_spike="skip"), steps=60)


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [7, 24])
@pytest.mark.parametrize("on_spike", ["warn", "skip"])
def test_a_resumed_run_warns_alike(at: int, on_spike: Any, tmp_path: Path) -> None:
    """It stops between two looks: counts, window, medians and what was said are in the checkpoint."""
    given: dict[str, Any] = {"scores": (0.0, 0.0, 0.0, -9.0), "loss": {27: 50.0}}
    whole = RoutingMonitor(SHORT, on_spike=on_spike)
    fit(Model(**given), whole)
    assert len(whole.warned) == 3
    first, second = (RoutingMonitor(SHORT, on_spike=on_spike) for _ in range(2))
    fit(Model(**given), first, Resumable(tmp_path), max_steps=at)
    fit(Model(**given), second, Resumable(tmp_path), ckpt_path=tmp_path / "last.ckpt")
    assert second.warned == whole.warned
    assert whole.watch is not None
    assert second.watch is not None
    assert second.watch.values == pytest.approx(whole.watch.values)


def test_counts_of_another_model_are_left_out() -> None:
    watch, other = TrainingWatch(Model()), TrainingWatch(nn.Linear(2, 2))
    watch.said.see(3, "dead", "moe", "x")
    state = watch.state()
    other.load(state)
    assert [one.step for one in other.said.warned] == [3]
    assert other.after_step(10) == []
    assert not other.values, "dense"


# -- several processes -------------------------------------------------------------------------------------------------


def _on_two_ranks(folder: str) -> list[Any]:
    """Rank 1 alone has the spike, and ranks have other tokens: DDP and every stage of the strategy."""
    found: list[Any] = []
    strategies: list[Any] = ["ddp", *(mk.ExpertParallelStrategy(2, zero_stage=stage) for stage in (0, 1, 2, 3))]  # type: ignore[arg-type]
    for number, strategy in enumerate(strategies):
        plugins = [JoinedProcesses()]
        options: dict[str, Any] = {"devices": 2, "strategy": strategy, "plugins": plugins}
        model, monitor = Model(loss={22: 90.0}, rank=1), RoutingMonitor(QUIET, on_spike="skip")
        watch = [] if number == 2 else [NonFinite()]
        fit(model, *watch, monitor, steps=25, gradient_clip_val=1.0, **options)
        assert monitor.watch is not None
        moved = changed(model)
        found.append((str(number), monitor.watch.skipped, moved, [w.text for w in monitor.warned],
                      round(monitor.watch.values["routing/moe/load_max_ratio"], 6)))  # fmt: skip
        dist.barrier()
    options = {"devices": 2, "strategy": "ddp", "plugins": [JoinedProcesses()]}
    try:
        stopping = RoutingMonitor(QUIET, on_spike="stop")
        fit(Model(loss={22: 90.0}, rank=1), stopping, Resumable(Path(folder)), steps=30, **options)
    except TrainingStoppedError as error:
        found.append(str(error))
    dist.barrier()
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_all_ranks_leave_out_the_same_step_and_stop_together(tmp_path: Path) -> None:
    one, other = run_distributed(_on_two_ranks, 2, str(tmp_path), timeout=300)
    assert one == other
    for number, skipped, moved, texts, _ in one[:5]:
        assert skipped == 1, number
        assert moved == [n for n in range(2, 26) if n != 23], number
        assert any("loss" in text and "of step 23 is a spike" in text for text in texts)
    assert len({ratio for *_, ratio in one[:5]}) == 1, "counts of both ranks, under every strategy"
    assert one[5].startswith("training stopped after step 23: loss")
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 23


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"every_n_steps": 0}, "every must be at least 1 optimizer step: got 0"),
        ({"on_spike": "no"}, "on_spike must be one of warn, skip, stop: got 'no'"),
        ({"on_dead": "skip"}, "on_dead must be one of warn, stop: got 'skip'"),
        ({"on_collapse": "skip"}, "on_collapse must be one of warn, stop: got 'skip'"),
    ],
)
def test_reactions_that_are_none_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RoutingMonitor(**given)


def test_thresholds_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Thresholds.window must be at least 1: got 0"):
        Thresholds(window=0)
    with pytest.raises(ValueError, match=r"Thresholds.max_drop_rate must be from 0 to 1: got 1.5"):
        Thresholds(max_drop_rate=1.5)


def test_a_single_expert_needs_no_balance() -> None:
    """Its loss is a constant: a gradient of 0 says nothing there."""
    two = LayerFigures("moe", (0.5, 0.5), True, 1, 0.0, None, None, ("load_balance",), 0.0)
    assert "weighs nothing" in str(unweighed(two))
    assert unweighed(dataclasses.replace(two, load=(1.0,))) is None
