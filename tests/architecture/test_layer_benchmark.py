"""benchmarks/layer.py at toy sizes: it runs, its arms agree, and it refuses where one does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from script_module import module_of

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "layer.py"


def test_the_layer_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    threads = torch.get_num_threads()
    with module_of(SCRIPT) as layer:
        own = ["--arms", "moekit", "grouped", "separate", "--no-keep-memory", "--quick"]
        assert layer.main([*own, "--json", str(tmp_path / "layer.json")]) == 0
        result = json.loads((tmp_path / "layer.json").read_text())
        wrong = layer.Plain(16, 48, 4, 2, True)
        wrong.k = 1
        with pytest.raises(SystemExit, match="refusing to report: wrong differs"):
            layer.check("wrong", wrong, torch.randn(8, 16), 2)
    torch.set_num_threads(threads)
    assert "| moekit packed |" in capsys.readouterr().out
    assert {"commit", "machine"} <= set(result["environment"])
    for case in result["cases"]:
        assert case["arms"]["dense"]["processor"]["ratio_of_least"] == 1.0
        assert case["arms"]["moekit packed"]["peak_bytes"] > 0
