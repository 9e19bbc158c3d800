"""What arms take of other arms' models, held to what these models will be before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from moekit.ablation.arm import Arm
from moekit.errors import UserError, nearest
from moekit.runs.config import RunConfig
from moekit.runs.distill import distill_config, inherited
from moekit.runs.finetune import fine_tune_config, prepare, require_network
from moekit.runs.settings.fields import missed_range
from moekit.runs.surgery.compensating import wanted_choices
from moekit.runs.surgery.utilisation import require_measured
from moekit.surgery import (
    aggregate,
    compensations,
    count_kept,
    parse_amount,
    require_separable,
    sparse_layers,
    take_experts,
)
from moekit.surgery.pruning import Order

_MOST_SEED = 2**32 - 1


def check_taken(arm: Arm, model: nn.ModuleDict, config: RunConfig, others: Mapping[str, nn.ModuleDict]) -> None:
    """Make sure that an arm can be made of the models that it names.

    Args:
        arm: the arm.
        model: network and heads under the arm's settings, on the meta device; it is prepared for fine-tuning.
        config: the arm's settings.
        others: the same of the arms that it is of.

    Raises:
        UserError: an option is unknown, out of its range, or does not suit these models; it begins with the option.
    """
    if arm.prune:
        _check_prune(arm, others[arm.of])
    if arm.of and not arm.trains and not arm.prune:
        require_network(model.state_dict(), others[arm.of].state_dict(), f"of: the model of {arm.of}")
    if arm.fine_tune is not None:
        chosen = fine_tune_config(arm.fine_tune)
        given = _joined(arm, model, others) if arm.aggregate else _kept(arm, model, others[arm.of])
        require_network(model.state_dict(), given, f"fine_tune: the model of {' and '.join(arm.others)}")
        prepare(model["backbone"], chosen)
    if arm.distill is not None:
        taught = distill_config(arm.distill)
        try:
            inherited(taught, model, others[arm.of], others[arm.of].state_dict())
        except UserError as error:
            raise UserError(f"distill: {error}") from None
    if arm.given_as and arm.given_as not in run_settings(config):
        listed = ", ".join(run_settings(config)) or "none"
        raise UserError(
            "given_as: must be a setting of the model that takes the folder of a run, and is not given, such as "
            f"model.embeddings: got {arm.given_as!r}. There are: {listed}."
        )


def run_settings(config: RunConfig) -> list[str]:
    """Dotted keys of a model's settings that are a path, and are not given: those that can take the folder of a run."""
    hints = get_type_hints(type(config.model))
    paths = [name for name, hint in hints.items() if {str, type(None)} == {*get_args(hint)}]
    return [f"model.{name}" for name in paths if getattr(config.model, name) is None]


def _check_prune(arm: Arm, model: nn.ModuleDict) -> None:
    """Hold the options of the command prune to the model of the arm that is pruned."""
    _check_options("prune", arm.prune, _PRUNE)
    if "keep" not in arm.prune:
        raise UserError("prune.keep: is missing: give how many experts stay in each layer, as 4 or 50%.")
    layers = sparse_layers(model)
    if not layers:
        raise UserError(f"prune: is for an arm with experts: {arm.of} has none.")
    by, language, task = (arm.prune.get(name) for name in ("by", "language", "task"))
    try:
        require_separable(layers, arm.of)
        count_kept(layers, parse_amount(str(arm.prune["keep"])))
        require_measured(by or "utilisation", language, task)
    except UserError as error:
        raise UserError(f"prune: {error}") from None


def _kept(arm: Arm, model: nn.ModuleDict, other: nn.ModuleDict) -> Mapping[str, Any]:
    """The state of the other model, without numbers, and without experts that the command prune would remove."""
    layers, state = sparse_layers(other), other.state_dict()
    if not arm.prune:
        return state
    left, own = count_kept(layers, parse_amount(str(arm.prune["keep"]))), sparse_layers(model)
    for path, count in left.items():
        if path in own and own[path].num_experts != count:
            raise UserError(
                f"prune: leaves {count} experts of {path}, and there are {own[path].num_experts} by the settings of "
                "this arm. Set model.num_experts."
            )
    tables = {name for layer in layers.values() for name in layer.ids}  # name experts, and keep their shape
    rest = {name: tensor for name, tensor in state.items() if name not in tables}
    return state | take_experts(rest, layers, {path: torch.arange(count) for path, count in left.items()})


def _joined(arm: Arm, model: nn.ModuleDict, others: Mapping[str, nn.ModuleDict]) -> Mapping[str, Any]:
    """The state of the model that the command aggregate makes, without numbers."""
    _check_options("aggregate", arm.aggregate, _AGGREGATE)
    parents = [others[name] for name in arm.others]
    layers, states = [sparse_layers(parent) for parent in parents], [parent.state_dict() for parent in parents]
    plain = bool(arm.aggregate.get("plain", False))
    if not layers[0]:
        raise UserError(f"aggregate: is for arms with experts: {arm.of} has none.")
    try:
        made = aggregate(states, layers, names=arm.others, compensate=not plain)
        needed = {} if plain else compensations(layers[0], len(parents))
    except UserError as error:
        raise UserError(f"aggregate: {error}") from None
    own = sparse_layers(model)
    for path, layer in layers[0].items():
        wanted = wanted_choices(layer, needed[path]) if needed else layer.k
        if path in own and layer.router and own[path].k != wanted:
            raise UserError(
                f"aggregate: a token chooses {wanted:g} experts of {path} in the joined model, and {own[path].k:g} by "
                "the settings of this arm. Set model.k, or give `plain: true`, which leaves choices as they are."
            )
    return made


def _check_options(group: str, given: Mapping[str, Any], known: Mapping[str, Callable[[Any], str]]) -> None:
    """Hold options of a command to rules, each of which returns what its option must be, or "" where it is that."""
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{group}.{key}: unknown option. {nearest(key, known)}")
        if wrong := known[key](value):
            raise UserError(f"{group}.{key}: must be {wrong}: got {value!r}.")


def _one_of(*words: Any) -> Callable[[Any], str]:
    listed = ", ".join(str(word).lower() if isinstance(word, bool) else str(word) for word in words)
    # True is 1, and the command takes no number there.
    return lambda value: (
        "" if any(value == word and type(value) is type(word) for word in words) else f"one of {listed}"
    )


def _amount(value: Any) -> str:
    try:
        parse_amount("" if isinstance(value, bool) else str(value))
    except ValueError:
        return "a number of experts (4), or a share of them (0.5 or 50%)"
    return ""


def _seed(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if whole and not missed_range(value, {"at_least": 0, "at_most": _MOST_SEED}) else "a whole number from 0"


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() else "text"


def _shared(value: Any) -> str:
    return "" if str(value) in ("mean", "1", "2") and not isinstance(value, bool) else "mean, 1 or 2"


_FLAG = _one_of(True, False)
_PRUNE = {"keep": _amount, "by": _one_of(*get_args(Order)), "seed": _seed, "plain": _FLAG, "language": _text,
          "task": _text}  # fmt: skip
_AGGREGATE = {"with": _text, "shared": _shared, "gates": _one_of("concatenate", "fresh"), "plain": _FLAG}
