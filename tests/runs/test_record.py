"""Records of a tested run: what is written is read, and so is what former versions wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moekit.errors import UserError
from moekit.runs import Run
from moekit.runs.record import LayerRecord, RoutingRecord, Sample, Summary

ROOT = Path(__file__).resolve().parents[2]
LAYER = {"name": "encoder.1", "num_experts": 2, "load": [0.5, 0.5]}


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/results/**/summary.json")), ids=lambda p: p.parent.name)
def test_summaries_of_former_versions_say_what_they_said(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    again = json.loads(json.dumps(Summary.from_json(data).to_json()))
    assert {key: again[key] for key in data} == data


def test_there_are_former_summaries() -> None:
    assert len(list(ROOT.glob("recipes/*/results/**/summary.json"))) >= 20


def test_a_record_is_what_was_written() -> None:
    layer = LayerRecord(name="encoder.1", num_experts=2, load=[0.25, 0.75], load_by_language={"avl": [0.5, 0.5]})
    routing = RoutingRecord(languages=["avl"], layers=[layer])
    assert RoutingRecord.from_json(json.loads(json.dumps(routing.to_json()))) == routing
    assert "experts_per_token" not in routing.to_json()["layers"][0]
    sample = Sample(hypothesis="mira")
    assert Sample.from_json(sample.to_json()) == sample
    assert sample.task == "translation"


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (Summary, [], "a Summary must be a mapping: got list"),
        (Summary, {"version": 2}, "a Summary must be of version 1: got 2"),
        (Summary, {"steps": "many"}, "steps must be int: got str"),
        (RoutingRecord, {}, "layers must be in a RoutingRecord"),
        (RoutingRecord, {"layers": "none"}, "layers must be Sequence: got str"),
        (RoutingRecord, {"layers": [{"name": "a"}]}, "num_experts must be in a LayerRecord"),
        (RoutingRecord, {"layers": [LAYER | {"load": None}]}, "load must be Sequence: got NoneType"),
        (Sample, {"source": "x"}, "hypothesis must be in a Sample"),
    ],
)
def test_what_is_no_record_is_refused(kind: Any, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind.from_json(data)


def test_a_field_of_the_wrong_kind_can_be_noted_instead() -> None:
    notes: list[str] = []
    found = Summary.from_json({"steps": "many", "recipe": "switch", "data": {"languages": 3, "source": "babel"}}, notes)
    assert (found.steps, found.recipe, found.data.source, found.data.languages) == (None, "switch", "babel", ())
    assert sorted(notes) == ["languages must be Sequence: got int.", "steps must be int: got str."]
    with pytest.raises(ValueError, match="num_experts must be int"):
        RoutingRecord.from_json({"layers": [LAYER | {"num_experts": "two"}]}, notes)


def test_a_run_reads_its_records(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert (run.summary, run.routing, run.samples) == (None, None, [])
    (tmp_path / "routing.json").write_text(json.dumps({"layers": [LAYER], "new": 1}))
    found = run.routing
    assert found is not None
    assert [layer.name for layer in found.layers] == ["encoder.1"]
    (tmp_path / "samples.json").write_text(json.dumps([{"hypothesis": "x"}]))
    assert run.samples == [Sample(hypothesis="x")]
    for text in ("{", "[]", '{"layers": 3}'):
        (tmp_path / "routing.json").write_text(text)
        with pytest.raises(UserError, match=r"routing.json cannot be read .*Write it again: test"):
            _ = run.routing
