"""Operations on runs: weights, optimizer state and configuration change together, and must fit one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts import AddNoise
from moekit.experts.base import is_matrix
from moekit.routing import Compensation
from moekit.runs.config import RunConfig
from moekit.runs.plain import differences, with_setting
from moekit.runs.recipe import RunText
from moekit.runs.run import Run
from moekit.runs.surgery.compensating import copies_of, describe, needs, noted, require_choices, with_choices
from moekit.runs.surgery.meaning import require_same_meaning
from moekit.runs.surgery.optimizer import optimizer_slots
from moekit.runs.text import training_data
from moekit.surgery import (
    SparseLayer,
    aggregate,
    carry_state,
    compensate,
    dense_names,
    merge,
    require_complete,
    require_separable,
    sparse_layers,
    split_experts,
    take_experts,
    upcycle,
)


@dataclass(frozen=True)
class Result:
    """What an operation makes, before it is written.

    Attributes:
        run: the run whose clock (steps, schedule, callbacks) may go on.
        config: configuration of the new model.
        weights: its state dict.
        slots: its optimizer state by parameter names; None = afresh.
        record: what was done, as plain data.
        said: lines for whoever asked.
        smoke: whether one of the runs was a smoke test, so that the numbers of the new one are no results either.
    """

    run: Run
    config: Any
    weights: dict[str, Tensor]
    slots: dict[str, dict[str, Any]] | None
    record: Mapping[str, Any]
    said: str = ""
    smoke: bool = False


def aggregate_runs(
    runs: Sequence[Run],
    *,
    shared_from: int | None = None,
    fresh_gates: bool = False,
    compensated: bool = True,
    seed: int = 0,
) -> Result:
    """One model with the experts of all.

    Args:
        runs: two or more; the clock of the first goes on.
        shared_from: take what is no expert's from the run of this number; None = average.
        fresh_gates: draw the routers' scores anew instead of putting their rows side by side.
        compensated: keep the parents' function: experts' outputs are scaled, and a token's choices multiplied, by what
            one softmax over all experts takes away; False = the paper's plain form.
        seed: seed of the draw.

    Raises:
        UserError: see `moekit.surgery.aggregate`; or the runs differ in settings that weights depend on, or the recipe
            has no setting for a token's choices.
    """
    first = runs[0]
    for other in runs[1:]:
        require_same_meaning(first, other)
    models = [run.model() for run in runs]
    layers = [sparse_layers(model) for model in models]
    names = [str(run.checkpoint) for run in runs]

    def together(states: Sequence[Mapping[str, Tensor]], power: int) -> Mapping[str, Tensor]:
        return aggregate(states, layers, shared_from=shared_from, names=names, compensate=compensated, power=power)

    weights = dict(together([run.loaded.weights for run in runs], 1))
    counts = {path: sum(found[path].num_experts for found in layers) for path in layers[0]}
    factor = len(runs) if compensated else 1
    config, target, needed = _fitting(first, layers[0], counts, factor, first.loaded.weights)
    slots = _carried(runs, models, together, target)
    if fresh_gates:
        drawn = _drawn(first, config, seed).state_dict()
        for name in (name for layer in layers[0].values() for name in layer.scores):
            weights[name] = drawn[name]
            if slots is not None:
                slots.pop(name, None)
    sizes = [sum(layer.num_experts for layer in found.values()) for found in layers]
    own = sum(size / copies_of(run) for size, run in zip(sizes, runs, strict=True)) / len(runs)
    return _made(
        "aggregate", runs, config, target, weights, slots,
        copies=sum(sizes) / own if compensated else copies_of(first), said=describe(layers[0], needed), needed=needed,
        shared_from=shared_from, fresh_gates=fresh_gates,
    )  # fmt: skip


def prune_run(run: Run, kept: Mapping[str, Tensor], *, compensated: bool = True, **note: Any) -> Result:
    """The experts with the given numbers, from `moekit.surgery.choose_experts`.

    What made up for copies (in a run that was aggregated or grown) is taken back by the share of experts that go, and
    wholly where no more are left than the parents had. Other runs keep their experts as they are.

    Args:
        run: the run.
        kept: Int64[m] by layer.
        compensated: False = leave experts and choices as they are in any run.
        **note: for the record.

    Raises:
        UserError: see `moekit.surgery.take_experts`; or the recipe cannot say such a model.
    """
    layers, copies = run.layers(), copies_of(run)
    left = min(kept, key=lambda path: kept[path].numel(), default=None)
    share = kept[left].numel() / layers[left].num_experts if left in layers and kept[left].numel() else 1.0
    return _taken(run, kept, min(1.0, max(share, 1 / copies)) if compensated and copies > 1 else 1.0, note)


def upcycle_run(
    run: Run, num_experts: int, *, noise: float = 0.0, scale: float = 1.0, compensated: bool = True, seed: int = 0
) -> Result:
    """A dense run with experts that are copies of its feed-forwards; of a sparse run, more experts as copies.

    Args:
        run: a run with or without experts.
        num_experts: E of the new model.
        noise: noise on matrices of the copies, in standard deviations of theirs; the optimizer starts afresh there.
        scale: the scale of `moekit.surgery.upcycle`; for a dense run.
        compensated: whether a sparse run keeps its function where every expert is copied as often (see
            `aggregate_runs`).
        seed: seed of noise and routers.

    Raises:
        UserError: see `moekit.surgery.upcycle`; or the recipe cannot say such a model.
    """
    layers = run.layers()
    if layers:
        if scale != 1:
            raise UserError(f"scale is for upcycling dense models: {run.path} is sparse. Leave it at 1.")
        return _grown(run, layers, num_experts, noise, seed, compensated=compensated)
    if num_experts < 1:
        raise UserError(f"upcycling needs 1 expert or more: got {num_experts}.")
    config = _set_experts(run, num_experts)
    target = _drawn(run, config, seed)
    perturb = AddNoise(noise) if noise else None
    weights = upcycle(run.loaded.weights, target, perturb=perturb, scale=scale, seed=seed)
    origins = dense_names(target)
    slots = None
    if not noise and scale == 1:

        def copies(states: Sequence[Mapping[str, Tensor]], power: int) -> Mapping[str, Tensor]:
            return upcycle(states[0], target, power=power)

        slots = _carried([run], [run.model()], copies, target, origins)
    note: dict[str, Any] = {"experts": num_experts, "noise": noise, "scale": scale, "seed": seed}
    return _made("upcycle", [run], config, target, weights, slots, **note)


def merge_run(run: Run, load: Mapping[str, Tensor] | None = None) -> Result:
    """The dense twin of a run, its feed-forwards averages of the experts; the optimizer starts afresh.

    Args:
        run: a run with experts.
        load: weights of the average by layer; None = all alike.

    Raises:
        UserError: see `moekit.surgery.merge`; or the recipe has no dense twin of this width.
    """
    source = run.model()
    layers, copies = sparse_layers(source), copies_of(run)
    require_separable(layers, str(run.checkpoint))
    config = _set_experts(run, 0)
    target = run.model(config)
    # What made up for smaller weights has no place where there are none.
    experts = compensate(run.loaded.weights, layers, 1 / copies) if copies > 1 else run.loaded.weights
    weights = merge(experts, source, target, load=load)
    return _made("merge", [run], config, target, weights, None, weighted=load is not None)


def split_run(run: Run, parts: int, *, divided: bool = True) -> Result:
    """Each expert cut into parts, as many times the choices of a token.

    Raises:
        UserError: see `moekit.surgery.split_experts`; or the recipe has no setting for a token's choices or the size of
            experts alone.
    """
    model = run.model()
    layers = sparse_layers(model)
    weights = split_experts(run.loaded.weights, layers, parts, divided=divided)
    config = _resized(run, layers, {path: layer.num_experts * parts for path, layer in layers.items()})
    settings = vars(config.model)
    size = "expert_hidden_dim" if "expert_hidden_dim" in settings else "hidden_dim"
    config = with_setting(config, f"model.{size}", (settings[size] or settings["hidden_dim"]) // parts)
    if "k" in settings:
        config = with_setting(config, "model.k", settings["k"] * parts)
    target = run.model(config)
    _require_same_dense(run, target, layers, size)
    found = sparse_layers(target)
    for path, layer in layers.items():
        if path in found and found[path].k != layer.k * parts:
            raise UserError(
                f"split needs a recipe in which a token's choices are a setting (model.k): {run.recipe.name} has "
                f"{layer.k:g} in {path}. moekit.surgery.split_experts does it for models of yours."
            )

    def split(states: Sequence[Mapping[str, Tensor]], power: int) -> Mapping[str, Tensor]:
        return split_experts(states[0], layers, parts, divided=divided, power=power)

    slots = _carried([run], [model], split, target)
    note: dict[str, Any] = {"parts": parts, "divided": divided}
    return _made("split", [run], config, target, weights, slots, copies=copies_of(run), **note)


def change_run(run: Run, config: Any) -> Result:
    """The same weights under another configuration, with another capacity or number of choices, for example.

    Raises:
        UserError: it is that of a model with other weights.
    """
    changed = differences(dataclasses.asdict(run.config), dataclasses.asdict(config))
    target = run.model(config)
    settings = {key: new for key, (_, new) in changed.items()}
    weights, slots = dict(run.loaded.weights), optimizer_slots(run)
    return _made("change", [run], config, target, weights, slots, copies=copies_of(run), settings=settings)


# -- what they share -----------------------------------------------------------------------------------------------


def _taken(run: Run, taken: Mapping[str, Tensor], copies: float, note: Mapping[str, Any]) -> Result:
    """The experts with the given numbers, and what makes up for `copies` times as many of each."""
    model = run.model()
    layers = sparse_layers(model)
    require_separable(layers, str(run.checkpoint))

    def take(states: Sequence[Mapping[str, Tensor]], power: int) -> Mapping[str, Tensor]:
        few = take_experts(states[0], layers, taken)
        return few if copies == 1 else compensate(few, layers, copies, power=power)

    weights = dict(take([run.loaded.weights], 1))
    counts = {path: layer.num_experts for path, layer in layers.items()} | {p: n.numel() for p, n in taken.items()}
    config, target, needed = _fitting(run, layers, counts, copies, weights)
    slots = _carried([run], [model], take, target)
    return _made(
        "take experts", [run], config, target, weights, slots,
        copies=copies_of(run) * copies, said=describe(layers, needed), needed=needed,
        experts={path: numbers.tolist() for path, numbers in taken.items()}, **note,
    )  # fmt: skip


def _grown(
    run: Run, layers: Mapping[str, SparseLayer], num_experts: int, noise: float, seed: int, *, compensated: bool
) -> Result:
    """More experts: the old ones in turn, as copies."""
    taken = {path: torch.arange(num_experts) % layer.num_experts for path, layer in layers.items()}
    fewer = [path for path, layer in layers.items() if num_experts < layer.num_experts]
    if fewer:
        raise UserError(
            f"{fewer[0]} has {layers[fewer[0]].num_experts} experts, and upcycling gives {num_experts}, no fewer. To "
            "keep some of them use prune."
        )
    uneven = [path for path, layer in layers.items() if num_experts % layer.num_experts]
    copies = 1.0 if uneven or not compensated else num_experts / next(iter(layers.values())).num_experts
    result = _taken(run, taken, copies, {"noise": noise, "seed": seed})
    if uneven and compensated:
        said = f"{num_experts} experts are no whole multiple of those of {uneven[0]}: the model computes something else"
        result = dataclasses.replace(result, said=said)
    if not noise:
        return result
    perturb, generator = AddNoise(noise), torch.Generator().manual_seed(seed)
    weights, slots = dict(result.weights), dict(result.slots or {})
    banked = {name: axes for layer in layers.values() for name, axes in layer.bank_axes.items()}
    for name in (name for layer in layers.values() for name in layer.dims):
        matrix = is_matrix(banked[name]) if name in banked else weights[name].ndim > 1
        if weights[name].is_floating_point() and matrix:
            weights[name] = perturb(weights[name], generator)
            slots.pop(name, None)
    return dataclasses.replace(result, weights=weights, slots=slots if result.slots is not None else None)


def _require_same_dense(run: Run, target: nn.Module, layers: Mapping[str, SparseLayer], size: str) -> None:
    """Make sure that a setting by which experts become smaller leaves everything else as it is.

    Raises:
        UserError: it is that of dense layers, too.
    """
    own = {name for layer in layers.values() for name in layer.dims}
    was = run.loaded.weights
    others = {name: now.shape for name, now in target.state_dict().items() if name not in own and name in was}
    if cut := next((name for name, shape in others.items() if shape != was[name].shape), None):
        raise UserError(
            f"split needs a recipe with a size of experts alone: in {run.recipe.name} the setting model.{size} is that "
            f"of dense layers too, and {cut} would be cut with the experts. Recipes that have no dense feed-forward "
            "beside the experts can be split, such as shazeer; moekit.surgery.split_experts splits models of yours."
        )


def _set_experts(run: Run, num_experts: int) -> Any:
    if not hasattr(run.config.model, "num_experts"):
        raise UserError(f"the recipe {run.recipe.name} has no setting model.num_experts.")
    return with_setting(run.config, "model.num_experts", num_experts)


def _resized(run: Run, layers: Mapping[str, SparseLayer], counts: Mapping[str, int]) -> Any:
    """The configuration with other numbers of experts: that of the layers that have as many as it says."""
    said = getattr(run.config.model, "num_experts", None)
    found = {counts[path] for path, layer in layers.items() if layer.num_experts == said}
    if len(found) != 1:
        raise UserError(
            f"the recipe {run.recipe.name} has one number of experts, model.num_experts={said}, which must become "
            f"one other: got {sorted(found) or 'no layer with so many'}."
        )
    return _set_experts(run, found.pop())


def _drawn(run: Run, config: Any, seed: int) -> nn.Module:
    """The model with fresh weights; the caller's random numbers are as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = training_data(run) if run.recipe.reads_text else None
        return run.recipe.parts(config, RunText(run.vocab_size, data), "cpu").named()


def _carried(
    runs: Sequence[Run],
    models: Sequence[nn.Module],
    operation: Any,
    target: nn.Module,
    origins: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]] | None:
    """Optimizer state through an operation; None where one of the runs has none."""
    states = [optimizer_slots(run) for run in runs]
    if any(state is None for state in states):
        return None
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    wanted = {name: p.shape for name, p in target.named_parameters()}
    names = origins or {}
    return carry_state(
        [s for s in states if s is not None], shapes, operation, wanted, lambda name: names.get(name, name)
    )


def _made(
    operation: str,
    runs: Sequence[Run],
    config: RunConfig,
    target: nn.Module,
    weights: dict[str, Tensor],
    slots: dict[str, dict[str, Any]] | None,
    *,
    copies: float = 1.0,
    said: str = "",
    needed: Mapping[str, Compensation] | None = None,
    **note: Any,
) -> Result:
    """The result, if its configuration describes its weights; `note` is for the record."""
    require_complete(weights, target, f"the recipe {runs[0].recipe.name} has no settings for such a model")
    record = {"operation": operation, "from": [str(run.checkpoint) for run in runs], **note}
    smoke = any(run.settings.get("smoke") for run in runs)
    return Result(runs[0], config, weights, slots, noted(record, copies, needed or {}), said, smoke)


def _fitting(
    run: Run, layers: Mapping[str, SparseLayer], counts: Mapping[str, int], copies: float, weights: Mapping[str, Tensor]
) -> tuple[RunConfig, nn.Module, dict[str, Compensation]]:
    """Configuration and model with other numbers of experts, and what makes up for `copies` times as many of each."""
    needed = needs(layers, copies, weights)
    config = with_choices(run, _resized(run, layers, counts), layers, needed)
    target = run.model(config)
    require_choices(run, target, layers, needed)
    return config, target, needed
