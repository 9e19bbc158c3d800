"""Routing that a run records while it trains, and the mechanisms of it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.callbacks import Callback

from moekit.atomic import write_json
from moekit.errors import UserError
from moekit.mechanisms import Mechanisms, mechanisms
from moekit.routing_traces import read_trace
from moekit.runs.config import RunConfig
from moekit.runs.run import MECHANISMS, ROUTING_TRACE, Run
from moekit.training.callbacks.routing_recorder import RoutingRecorder
from moekit.training.multitask import MultitaskModule

KINDS = ("valid", "train")
"""Folders of `ROUTING_TRACE`, and what is recorded in each: the same text at every step, and the batches trained on."""


def recorders(run: Run, config: RunConfig, module: MultitaskModule) -> list[Callback]:
    """What keeps routing while a run trains, of a model that is sparse.

    Raises:
        UserError: nothing is validated.
    """
    if not config.train.validate_every:
        raise UserError("train.record_routing needs validations: train.validate_every is 0. Set both, or none.")
    if module.valid_routing is None:
        return []
    place, every = run.path / ROUTING_TRACE, config.train.record_routing
    return [
        RoutingRecorder(place / "valid", every=every, of="valid", weights=False),
        RoutingRecorder(place / "train", every=every, of="train", weights=False),
    ]


def recorded(run: Run) -> dict[str, Mechanisms]:
    """Mechanisms of what was recorded in training: of "valid" and "train", as far as they are there.

    Raises:
        UserError: a file is damaged, or missing.
    """
    places = {kind: run.path / ROUTING_TRACE / kind for kind in KINDS}
    return {kind: mechanisms(read_trace(place)) for kind, place in places.items() if place.is_dir()}


def write_mechanisms(run: Run, found: Mapping[str, Mechanisms]) -> None:
    """Keep mechanisms as ``mechanisms.json`` in the run's folder, where tables of an ablation find them.

    Args:
        run: the run.
        found: Mechanisms by what was routed, "valid", "train" or "test".
    """
    write_json(run.path / MECHANISMS, {kind: one.to_json() for kind, one in found.items()})
