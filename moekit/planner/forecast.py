"""`plan`: what a model needs on a layout, without running it."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from moekit.errors import UserError
from moekit.parallel.layout import Layout, Training
from moekit.planner.census import Census, take_census
from moekit.planner.memory import TENSOR_AXES, Memory, local_shape, memory_of, sharded_shape, sharers, zero_cut
from moekit.planner.shape import TransformerShape
from moekit.planner.traffic import Traffic, traffic_of
from moekit.terminal import Terminal

GIB = 2**30
"""Bytes of a GiB."""

_COLUMN_WIDTH = 40  # characters


@dataclass(frozen=True)
class Forecast:
    """What a model needs on a layout: the result of `plan`.

    Attributes:
        census: the model in units.
        layout: how devices share it.
        training: what a device does in a step.
        memory: bytes of the fullest device.
        traffic: bytes that each device sends per step.
    """

    census: Census
    layout: Layout
    training: Training
    memory: Memory
    traffic: Traffic

    @property
    def parameters(self) -> int:
        """Numbers to learn."""
        return self.census.parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes."""
        return self.census.active_parameters

    @property
    def parameters_per_device(self) -> int:
        """Parameters that a device stores."""
        cut = sharded_shape if self.layout.zero_stage >= 2 else local_shape
        return round(self.census.total(lambda weight: math.prod(cut(weight, self.layout))))

    @property
    def tokens(self) -> int:
        """Tokens of a data-parallel device's micro-batch, source and target."""
        names = [unit.name for unit in self.census.units if unit.kind == "block"]
        source = self.training.source_tokens if any(name.startswith("encoder") for name in names) else 0
        target = self.training.target_tokens if any(name.startswith("decoder") for name in names) else 0
        return source + target

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all devices."""
        return self.tokens * self.training.accumulate * self.layout.data_parallel_size

    @property
    def flops_per_token(self) -> float:
        """Operations of forward and backward for a token."""
        return self.census.training_flops / self.tokens

    @property
    def flops_per_step(self) -> float:
        """Operations that one device carries out in a step, with those that checkpointing repeats."""
        blocks = sum(unit.count * unit.cost.flops for unit in self.census.units if unit.kind == "block")
        once = self.census.training_flops + (blocks if self.training.checkpointing else 0.0)
        return once * self.training.accumulate / self.layout.tensor_parallel_size

    def fits(self, memory: float) -> bool:
        """Whether the fullest device needs at most `memory` bytes.

        Leave room (a tenth, say) for what no formula knows: the allocator's fragments, communication buffers, an
        expert that gets more than its share of tokens.
        """
        return self.memory.device <= memory

    def table(self) -> str:
        """The forecast as text for a terminal."""
        return compare({self.census.name: self})

    def markdown(self) -> str:
        """The forecast as a Markdown table."""
        return compare({self.census.name: self}, markdown=True)


def plan(model: TransformerShape | nn.Module, layout: Layout, training: Training | None = None) -> Forecast:
    """Parameters, memory, communication and operations of training `model` on `layout`; nothing is run.

    Args:
        model: a `TransformerShape`, or a module that contains a moekit transformer; on the meta device it costs no
            memory.
        layout: how devices share the model.
        training: micro-batch, precision, optimizer, checkpointing.

    Raises:
        UserError: if experts, heads, hidden channels or vocabulary cannot be divided evenly, or the module contains no
            transformer.

    Source: the memory model is that of arXiv:1910.02054 section 3, with experts divided as in arXiv:2006.16668
        section 3.

    Example:
        >>> from moekit.planner import ZCODE_M3_10B
        >>> made = plan(ZCODE_M3_10B, Layout(devices=64, expert_parallel_size=64), Training(checkpointing=True))
        >>> f"{made.parameters / 1e9:.1f} billion, {made.active_parameters / 1e9:.1f} active"
        '10.3 billion, 0.8 active'
    """
    training = training or Training()
    return forecast_of(take_census(model, training), layout, training)


def forecast_of(census: Census, layout: Layout, training: Training) -> Forecast:
    """`plan` of a model that is counted already (with the same `training`), on another layout."""
    _check_experts(census, layout)
    _check_divisions(census, layout)
    memory, traffic = memory_of(census, layout, training), traffic_of(census, layout, training)
    return Forecast(census, layout, training, memory, traffic)


def _check_experts(census: Census, layout: Layout) -> None:
    size = layout.expert_parallel_size
    counts = sorted({w.shape[0] for u in census.units for w in u.weights if w.is_expert})
    if size > 1 and not counts:
        raise UserError(f"expert_parallel_size is {size}, but {census.name} has no experts. Use 1.")
    for count in counts:
        if count % size:
            fitting = [n for n in range(1, count + 1) if count % n == 0 and layout.devices % n == 0]
            near = min(fitting, key=lambda n: abs(n - size))
            raise UserError(
                f"the number of experts must be a multiple of expert_parallel_size: got {count} experts and {size}. "
                f"Use expert_parallel_size {near}, or {size * math.ceil(count / size)} experts."
            )


def _check_divisions(census: Census, layout: Layout) -> None:
    size = layout.tensor_parallel_size
    for unit in census.units:
        for weight in unit.weights:
            for length, axis in zip(weight.shape, weight.axes, strict=False):
                if axis in TENSOR_AXES and length % size:
                    raise UserError(
                        f"the axis {axis!r} of the {unit.name} must be a multiple of tensor_parallel_size: got "
                        f"{length} and {size}. Use {math.ceil(length / size) * size}, or another tensor_parallel_size."
                    )
            if layout.zero_stage >= 2 and weight.shape and zero_cut(weight, layout) is None:
                raise UserError(
                    f"ZeRO stage {layout.zero_stage} must divide a weight of shape {local_shape(weight, layout)} of "
                    f"the {unit.name} among {sharers(weight, layout)} devices, and no dimension is a multiple. Use "
                    "zero_stage=1, or another number of devices."
                )


def _cells(made: Forecast) -> dict[str, str]:
    """What tables say of a forecast, by label."""
    memory, traffic, census = made.memory, made.traffic, made.census

    def gib(count: float) -> str:
        return f"{count / GIB:,.2f} GiB"

    return {
        "layout": str(made.layout),
        "precision, optimizer": f"{made.training.numbers.name}, {made.training.optimizer}",
        "parameters": number(census.parameters),
        "of experts": number(census.expert_parameters),
        "active per token": number(census.active_parameters),
        "at most, in training": number(census.most_active_parameters),
        "trained": number(census.trained_parameters),
        "stored per device": number(made.parameters_per_device),
        "weights": gib(memory.weights),
        "gradients": gib(memory.gradients),
        "optimizer": gib(memory.optimizer),
        "working copies": gib(memory.working),
        "activations": gib(memory.activations),
        "device memory": gib(memory.device),
        "host memory": gib(memory.host),
        "tokens per step": f"{made.tokens_per_step:,}",
        "FLOPs per token": number(made.flops_per_token),
        "FLOPs per device and step": number(made.flops_per_step),
        "sent: all-to-all": gib(traffic.all_to_all),
        "sent: all-gather": gib(traffic.all_gather),
        "sent: reduce-scatter": gib(traffic.reduce_scatter),
        "sent: all-reduce": gib(traffic.all_reduce),
    }


def _unsaid(made: Forecast) -> set[str]:
    """The labels of cells that only say again what another says."""
    census = made.census
    unsaid = {
        "at most, in training": census.most_active_parameters == census.active_parameters,
        "trained": census.trained_parameters == census.parameters,
    }
    return {label for label, same in unsaid.items() if same}


def number(value: float) -> str:
    """A large number in three digits: ``10.3 B``."""
    value = float(f"{value:.3g}")  # so that 999,600 is 1 M
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:,.3g} {unit}" if value < 1e3 * limit else f"{value / limit:,.0f} {unit}"
    return f"{value:,.0f}"


def compare(plans: dict[str, Forecast], *, markdown: bool = False) -> str:
    """Several forecasts side by side, by heading; as `markdown` for a page, else for a terminal."""
    columns = [_cells(made) for made in plans.values()]
    unsaid = set.intersection(*map(_unsaid, plans.values()))
    rows = [(label, *(column[label] for column in columns)) for label in columns[0] if label not in unsaid]
    if markdown:
        head = ["| | " + " | ".join(plans) + " |", "| --- |" + " ---: |" * len(plans)]
        return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in plans:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    file = io.StringIO()
    Terminal(file=file, width=_COLUMN_WIDTH * (1 + len(plans)), color_system=None).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines() if line.strip())
