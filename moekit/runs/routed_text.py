"""The routing of a trained run's test text, as a trace."""

from __future__ import annotations

from pathlib import Path

import torch

from moekit.routing_traces import record
from moekit.runs.config import RunConfig
from moekit.runs.evaluate import trained_module
from moekit.runs.run import TEST_TRACE, Run
from moekit.runs.text import evaluation_data


def record_test(run: Run, config: RunConfig | None = None, file: Path | None = None) -> Path:
    """Write the routing of a trained run's test text: of the tasks that its test measures, with right answers given.

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
