"""Quality against size: a run with fewer and fewer experts, chosen in several ways, validated each time."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import lightning as L
from torch import Tensor

from moekit.data.module import MultitaskData
from moekit.planner.census import parameters
from moekit.runs.config import RunConfig
from moekit.runs.evaluate import trained_module
from moekit.runs.run import Run
from moekit.runs.settings.tasks import active_tasks
from moekit.runs.surgery.operations import Result, prune_run
from moekit.runs.surgery.utilisation import measured_load, validate
from moekit.runs.text import evaluation_data, training_data
from moekit.surgery import choose_experts, require_separable
from moekit.surgery.pruning import Order
from moekit.training.multitask import MultitaskModule
from moekit.training.quiet import quiet
from moekit.wording import counted

LABELS: Mapping[Order, str] = {
    "utilisation": "the most used", "random": "at random", "reversed": "the least used", "reap": "by REAP saliency",
}  # fmt: skip
"""Ways to choose experts, in words."""


@dataclass(frozen=True)
class Point:
    """One pruned model.

    Attributes:
        keep: share of the experts, or their number.
        order: how they were chosen.
        seed: seed of the draw, where they were drawn.
        experts: numbers of the kept experts by layer.
        parameters: their number in the pruned network.
        loss: validation loss of the first task, nats per prediction.
        recovered: the same after training on; None where there was none.
    """

    keep: int | float
    order: Order
    seed: int | None
    experts: Mapping[str, list[int]]
    parameters: int
    loss: float
    recovered: float | None = None


@dataclass(frozen=True)
class Recovery:
    """Training of each model on the same data, the whole one included, which is the control.

    Attributes:
        steps: optimizer steps, a tenth of them warm-up, in the run's schedule; Adam's moments start afresh.
        learning_rate: the peak.
    """

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Curve:
    """Points of one run.

    Attributes:
        run: the checkpoint.
        task: whose loss.
        whole: the point of all experts.
        points: those of pruned models.
        recovery: how they were trained on.
        text: what was read, where the run does not say it.
    """

    run: str
    task: str
    whole: Point
    points: Sequence[Point]
    recovery: Recovery | None
    text: str = ""


def pruning_curve(
    run: Run,
    keep: Sequence[int | float],
    *,
    draws: int = 20,
    recovery: Recovery | None = None,
    seed: int = 0,
    language: str | None = None,
    task: str | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> Curve:
    """Validate the run with its experts pruned by utilisation, in reverse, and at random.

    Args:
        run: the run.
        keep: shares or numbers of experts; see `moekit.surgery.count_kept`.
        draws: random choices for each of them.
        recovery: train each pruned model on, and validate again; None = do not.
        seed: seed of the first draw; the others have the numbers after it.
        language: utilisation of this language.
        task: utilisation in this task.
        advance: told what has been validated, for a progress bar.

    Raises:
        UserError: see `prune_run` and `measured_load`.
    """
    layers = run.layers()
    require_separable(layers, str(run.checkpoint))
    arms: list[tuple[int | float, Order, int | None]] = []
    for share in keep:
        arms += [(share, "utilisation", None), (share, "reversed", None)]
        arms += [(share, "random", seed + draw) for draw in range(draws)]
    load = measured_load(run, language=language, task=task)
    chosen = [choose_experts(layers, share, order, load=load, seed=number or 0) for share, order, number in arms]
    data = evaluation_data(run)
    if recovery is not None:
        training_data(run)  # there, and what it was: before anything is computed

    def point(share: int | float, order: Order, number: int | None, kept: Mapping[str, Tensor]) -> Point:
        result = prune_run(run, kept)
        module = trained_module(run, data, result.config, result.weights)
        found = Point(
            keep=share,
            order=order,
            seed=number,
            experts={path: experts.tolist() for path, experts in kept.items()},
            parameters=parameters(module.backbone)["total"],
            loss=_loss(module, data, result.config),
        )
        if recovery is not None:
            found = dataclasses.replace(found, recovered=_recovered(run, result, recovery))
        advance(f"{share:g} {LABELS[order]}")
        return found

    whole = point(1.0, "utilisation", None, choose_experts(layers, 1.0, "random"))
    points = [point(*arm, kept) for arm, kept in zip(arms, chosen, strict=True)]
    return Curve(str(run.checkpoint), _task(run.config), whole, points, recovery)


def table(curve: Curve) -> str:
    """The curve as markdown: a row for each number of kept experts; mean and standard deviation over draws."""
    kinds: list[tuple[str, Callable[[Point], float | None]]] = [("", lambda p: p.loss)]
    if curve.recovery is not None:
        kinds.append((", trained on", lambda p: p.recovered))
    orders = [order for order in LABELS if any(point.order == order for point in curve.points)]
    head = ["kept", "parameters", *(f"{LABELS[order]}{suffix}" for suffix, _ in kinds for order in orders)]
    lines = [_cells(head), _cells(["---:"] * len(head))]
    whole = [_summary([value(curve.whole)]) for _, value in kinds for _ in orders]
    lines.append(_cells(["all", f"{curve.whole.parameters:,}", *whole]))
    for keep in dict.fromkeys(point.keep for point in curve.points):
        here = [point for point in curve.points if point.keep == keep]
        row = [f"{keep:.0%}" if isinstance(keep, float) else str(keep), f"{here[0].parameters:,}"]
        for _, value in kinds:
            row += [_summary([value(point) for point in here if point.order == order]) for order in orders]
        lines.append(_cells(row))
    draws = len({point.seed for point in curve.points if point.seed is not None})
    read = f", of {curve.text}" if curve.text else ""
    note = f"Validation loss of {curve.task}, nats per prediction{read}; "
    note += f"at random: mean ± standard deviation, {counted(draws, 'draw')}."
    if curve.recovery is not None:
        note += f" Trained on: {curve.recovery.steps:,} steps at a peak rate of {curve.recovery.learning_rate:g}."
    return "\n".join([*lines, "", note + _same_sizes(curve), ""])


def _same_sizes(curve: Curve) -> str:
    """Says of shares that come to as many experts as another one, which a reader takes for another size."""
    sizes: dict[tuple[int, ...], list[str]] = {}
    for keep, point in {point.keep: point for point in curve.points}.items():
        named = f"{keep:.0%}" if isinstance(keep, float) else str(keep)
        sizes.setdefault(tuple(map(len, point.experts.values())), []).append(named)
    same = [" and ".join(names) for names in sizes.values() if len(names) > 1]
    why = "shares are rounded, to no fewer than a token chooses"
    return "".join(f" {names} keep equally many experts: {why}." for names in same)


def _cells(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _summary(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.3f}{spread}"


def _task(config: RunConfig) -> str:
    """Of several tasks the first is the one that the recipe is about."""
    return next(iter(active_tasks(config.tasks)))


def _loss(module: MultitaskModule, data: MultitaskData, config: RunConfig) -> float:
    return float(validate(module, data, config)[f"valid/{_task(config)}/loss"])


def _recovered(run: Run, result: Result, recovery: Recovery) -> float:
    rate, steps = recovery.learning_rate, recovery.steps
    train = {"max_steps": steps, "max_minutes": 0.0, "learning_rate": rate, "warmup_steps": steps // 10}
    config: RunConfig = result.config.changed(train=train)
    L.seed_everything(config.train.seed, verbose=False)
    data = training_data(run, config)
    module = trained_module(run, data, config, result.weights).train()
    trainer = config.train.elsewhere().trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0
    )
    with quiet():
        trainer.fit(module, datamodule=data)
    return _loss(module.eval(), data, config)
