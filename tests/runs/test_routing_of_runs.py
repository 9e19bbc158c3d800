"""Routing of a run: recorded in training, measured in its test, and of its test text by a command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from moekit.ablation import plan
from moekit.ablation.measures import measure
from moekit.ablation.plan import Job
from moekit.cli.program import main
from moekit.routing_traces import read_trace
from moekit.runs.config import RunConfig
from moekit.runs.plain import as_plain
from moekit.runs.recipe import find_recipe

SIZES = shlex.split(
    "--model.dim 16 --model.heads 2 --model.hidden_dim 32 --model.num_experts 4 --model.encoder_layers 2 "
    "--model.decoder_layers 2 --data.vocab_size 400 --data.babel_sentences 300 --data.max_length 40"
)
TINY = shlex.split(
    "--data.num_workers 0 --train.max_steps 4 --train.max_minutes 0 --train.warmup_steps 1 --train.accelerator cpu "
    "--evaluate.beam_size 1 --evaluate.max_sentences 4 --evaluate.valid_sentences 4"
)


def test_a_run_keeps_its_routing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, cache = tmp_path / "run", ["--data.cache", str(tmp_path / "cache")]
    record = ["--train.validate_every", "2", "--train.record_routing", "2"]
    assert main(["run", "zcode_m3", *SIZES, *TINY, *cache, *record, "--out", str(out)]) == 0
    trace = read_trace(out / "routing_trace" / "valid")
    assert trace.layers == {"encoder.1": 4, "decoder.1": 4}
    assert sorted(set(trace.steps)) == [2, 4]
    assert set(trace.tasks) == {"translation", "denoising", "masked_lm", "replaced_token"}
    first = trace[0].layers["encoder.1"]
    assert first.tokens.ids is not None
    assert first.tokens.language is not None
    assert not first.weighed
    assert 0 < measure(out, "mechanisms.valid.saturation") < 1
    information = "mechanisms.valid.mutual_information"
    assert measure(out, f"{information}.token") > measure(out, f"{information}.language")
    batches = read_trace(out / "routing_trace" / "train")
    assert sorted(set(batches.steps)) == [0, 2]
    assert all(batch.training for batch in batches)
    assert measure(out, "mechanisms.train.drop_rate") > 0, "training has a capacity"
    assert measure(out, "mechanisms.train.gradient_spread") >= 1
    capsys.readouterr()
    # Of the test text; a table, figures, and the same as JSON.
    assert main(["routing", str(out), "--figures", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    assert "Routing of validation text at step 4" in said
    assert "Routing in training at step 2" in said
    assert "Routing of the test text at step 4" in said
    assert "encoder.1" in said
    assert (tmp_path / "figures" / "valid-saturation.png").read_bytes()[:4] == b"\x89PNG"
    test = read_trace(out / "routing_test.npz")
    assert set(test.tasks) == {"translation"}, "the task that its test measures"
    assert test.notes["languages"].count(",") > 1
    assert test[0].layers["encoder.1"].weighed
    assert main(["routing", str(out), "--json", "--output", str(tmp_path / "own.npz")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [*content] == ["valid", "train", "test"]
    assert content == json.loads((out / "mechanisms.json").read_text())
    assert (tmp_path / "own.npz").read_bytes() == (out / "routing_test.npz").read_bytes()
    # What is damaged spoils no test of the run.
    damaged = next((out / "routing_trace" / "valid").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["test", str(out)]) == 0
    assert "mechanisms of routing are not measured" in capsys.readouterr().err
    # A run without it has the test text alone; a new run leaves nothing of the old one.
    assert main(["fit", "zcode_m3", *SIZES, *TINY, *cache, "--out", str(out), "--overwrite"]) == 0
    assert not {"routing_trace", "routing_test.npz", "mechanisms.json"} & {path.name for path in out.iterdir()}
    assert main(["routing", "--out", str(out), "--json"]) == 0
    assert [*json.loads((out / "mechanisms.json").read_text())] == ["test"]


def test_nothing_to_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run"), "--data.cache", str(tmp_path / "cache")]
    assert (
        main(["fit", "zcode_m3", *SIZES, *TINY, *out, "--train.validate_every", "0", "--train.record_routing", "2"])
        == 2
    )
    assert "train.validate_every is 0. Set both" in capsys.readouterr().err
    dense = ["--model.num_experts", "0", "--train.validate_every", "2", "--train.record_routing", "2"]
    assert main(["fit", "zcode_m3", *SIZES, *TINY, *out, *dense]) == 0
    assert not (tmp_path / "run" / "routing_trace").exists()
    assert main(["routing", str(tmp_path / "run")]) == 2
    assert "has no MoELayer" in capsys.readouterr().err


def test_runs_of_tables_that_do_not_record_are_those_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest, by which tables find the runs that they have made, knows the setting where it is given alone."""
    config = find_recipe("switch", "").variants["tiny"].config
    recording = config.changed(train={"record_routing": 50})
    plain = {name: Job("switch", "tiny", c, "").digest for name, c in (("none", config), ("some", recording))}
    assert plain["none"] != plain["some"]

    def without(config: RunConfig) -> dict[str, Any]:
        found = as_plain(config)
        del found["train"]["record_routing"]
        return found

    monkeypatch.setattr(plan, "as_plain", without)
    assert Job("switch", "tiny", config, "").digest == plain["none"]
