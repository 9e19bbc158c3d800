"""The sample report of the documentation: a page of today's parts that needs nothing else and names no machine."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moekit.report import render
from moekit.report.run import run_view
from moekit.report.run_folder import RunFolder
from moekit.report.view import texts

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "sample-report.html", DOCS / "assets" / "report.png"
AGAIN = "The page has other parts now: make sample (CONTRIBUTING.md)."


class Parts(HTMLParser):
    """What a page consists of: sections by id, headings of figures, labels of tiles, and all addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.texts: dict[str, list[str]] = {"h3": [], "dt": []}
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self._inside.append(tag)
        if tag == "section":
            self.sections.append(str(given["id"]))
        self.addresses += [
            f"{name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")
        ]

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] in self.texts and data.strip():
            self.texts[self._inside[-1]].append(data.strip())


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_it_has_the_parts_that_a_report_has_today(page: str) -> None:
    shown = Parts(page)
    assert shown.sections == ["scores", "losses", "experts", "routing", "samples", "reproduce"], AGAIN
    figures = texts()["figures"]
    for name in ("accuracy", "learning_rate", "speed", "grad_norm", "load", "health", "language_maps", "typical"):
        assert figures[name][0] in shown.texts["h3"], AGAIN
    logged = {"router_z"} ^ set(texts()["routing"])  # a loss that this recipe has not
    assert {texts()["routing"][name][0] for name in logged} <= set(shown.texts["h3"]), AGAIN
    for tile in ("BLEU, average", "chrF, average", "Perplexity", "Speed", "Work", "Memory", "Parameters", "Time"):
        assert tile in shown.texts["dt"], AGAIN


def test_it_looks_as_a_report_looks_today(page: str) -> None:
    style = re.compile(r"<style>.*?</style>", re.DOTALL)
    today = render.html(run_view(RunFolder(Path("gshard-tiny"))))
    assert style.search(page)[0] == style.search(today)[0], AGAIN  # type: ignore[index]
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(page)[0] == policy.search(today)[0], AGAIN  # type: ignore[index]


def test_it_needs_nothing_else(page: str) -> None:
    shown = Parts(page)
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert not shown.tags & {"script", "link", "iframe", "object", "embed", "img", "form"}
    assert [address for address in shown.addresses if not re.match(r"(xlink:)?href=#", address)] == []
    assert not re.search(r"url\((?!#)|@import|javascript:", page)


def test_it_is_of_a_whole_run_and_names_no_place_of_a_machine(page: str) -> None:
    assert "of the schedule" not in page
    assert "moekit run gshard" in page
    assert re.search(r"commit.changed</th><td[^>]*>False", page)
    assert not re.search(r"(?<![\w.&;<])/(home|root|tmp|Users|work|mnt|opt|usr|var|srv)/", page)
    assert not re.search(r"hostname|localhost|~/", page)


def test_page_and_picture_are_small(page: str) -> None:
    assert len(page.encode()) < 250 * 1024
    assert PICTURE.read_bytes().startswith(b"\x89PNG")
    assert PICTURE.stat().st_size < 300 * 1024
