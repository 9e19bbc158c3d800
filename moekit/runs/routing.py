"""Routing of a run as traces and mechanisms: of its test text by command, of validation text while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moekit.atomic import write_json
from moekit.errors import UserError
from moekit.mechanisms import Mechanisms, mechanisms
from moekit.routing_traces import read_trace, record
from moekit.runs.config import RunConfig
from moekit.runs.evaluate import trained_module
from moekit.runs.run import MECHANISMS, ROUTING_TRACE, TEST_TRACE, Run
from moekit.runs.text import evaluation_data


def record_test(run: Run, config: RunConfig | None = None, file: Path | None = None) -> Path:
    """Write the routing of a trained run's test text: all of its tasks, with the right answers given.

    Args:
        run: the run.
        config: its settings, where they are not the run's: other sizes of a batch, for example.
        file: where to; None = ``routing_test.npz`` in the run's folder.

    Returns:
        The file.

    Raises:
        UserError: nothing was trained there, the model is dense, or the file cannot be written.
    """
    config = config or run.config
    data = evaluation_data(run, config)
    module = trained_module(run, data, config)
    data.prepare_data()
    data.setup("test")
    place = file or run.path / TEST_TRACE
    notes = {"of": "test", "run": run.path.name, "languages": ",".join(data.tokenizer.languages)}
    with torch.no_grad(), record(module, place, notes=notes) as recording:
        recording.tell(step=int(run.loaded.rest.get("global_step", 0)))
        for batch in data.test_dataloader():
            module(batch)
    return place


def measured(run: Run, trace: Path | None = None) -> Mechanisms:
    """The mechanisms of a trace of a run.

    Args:
        run: the run.
        trace: a trace; None = what was recorded in training, else of its test text.

    Raises:
        UserError: there is none, or it is damaged.
    """
    places = [trace] if trace is not None else [run.path / ROUTING_TRACE, run.path / TEST_TRACE]
    place = next((found for found in places if found.exists()), None)
    if place is None:
        raise UserError(
            f"{run.path} keeps no routing: train with --train.record_routing STEPS, or record its test text with the "
            "command routing."
        )
    return mechanisms(read_trace(place))


def write_mechanisms(run: Run, found: Mechanisms, of: str) -> Mapping[str, Any]:
    """Keep mechanisms as ``mechanisms.json`` in the run's folder, where tables of an ablation find them.

    Args:
        run: the run.
        found: the mechanisms.
        of: the text that was routed.
    """
    content = {"of": of, **found.to_json()}
    write_json(run.path / MECHANISMS, content)
    return content
