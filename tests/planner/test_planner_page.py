"""The tables of the planner's guide are what its code prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "planner.md"


def test_every_number_on_the_page_is_printed_by_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = list(re.finditer(r"```python\n(.*?)```\n(?P<shown>\n(\|.*?\n(?=\n)|```text\n.*?```\n))?", text, re.S))
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block[1], str(PAGE), "exec", dont_inherit=True), names)
        printed = capsys.readouterr().out.strip()
        shown = re.sub(r"^```(text)?$", "", block["shown"] or "", flags=re.M).strip()
        assert shown == printed
        if printed:
            assert text.count(printed) == 1
    assert sum(bool(block["shown"]) for block in found) >= 6


def test_the_claims_of_the_text() -> None:
    """What the prose around the tables says of them."""
    text = PAGE.read_text(encoding="utf-8")
    rows = {cells[1].strip(): cells for line in text.splitlines() if (cells := line.split("|"))[1:]}

    def column(label: str, number: int) -> float:
        return float(re.sub(r"[^\d.]", "", rows[label][number + 1]))

    assert 3.5e3 <= column("E + Z-Off + M", 1) < 3.6e3
    assert 12 <= column("E + Z-Off + M", 5) < 13
    assert 3.8 <= column("E + Z-Off + M", 1) / column("E + D + M", 1) < 4.2
    assert 3.0 <= column("E + Z-Off + M", 1) / column("E + Z + M", 1) < 3.5
    gathered = next(line for line in text.splitlines() if line.startswith("| sent: all-gather")).split("|")
    with_experts, alone = (float(cell.split()[0]) for cell in gathered[4:6])
    assert 11.5 < alone / with_experts < 12.5
