"""report.html: complete, self-contained, safe with any text, and readable by a machine that checks HTML."""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_runs import BABEL, SENTENCES, WORLD, make_run, write_rows

from moekit.errors import UserError
from moekit.report import write_report
from moekit.report.run_folder import FILES

VOID = {"meta", "col", "br", "link", "img", "hr", "input"}
SECTIONS = ("scores", "losses", "experts", "routing", "samples", "reproduce")


class Page(HTMLParser):
    """Checks nesting, and keeps tags, ids and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}> at {self.getpos()}"
        self.open.pop()
        if tag in ("td", "th", "dt", "dd", "p", "h1", "li", "small"):
            self.text.append(" ")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("tiny"), steps=1500)


@pytest.fixture(scope="module")
def tiny_html(tiny: Path) -> str:
    return write_report(tiny).read_text(encoding="utf-8")


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_every_section_is_there_and_linked(tiny_html: str) -> None:
    page = Page(tiny_html)
    assert [a["id"] for a in page.all("section")] == list(SECTIONS)
    assert [a["href"] for a in page.all("a")] == [f"#{name}" for name in SECTIONS]


def test_page_needs_nothing_else(tiny_html: str) -> None:
    assert "http:" not in tiny_html
    assert "https:" not in tiny_html
    assert "@import" not in tiny_html
    assert not re.search(r"url\((?!#)", tiny_html)
    page = Page(tiny_html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert any("default-src 'none'" in (a.get("content") or "") for a in page.all("meta"))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_page_is_small(tiny_html: str) -> None:
    assert len(tiny_html) < 1_000_000


def test_page_is_the_same_twice(tiny: Path, tiny_html: str) -> None:
    assert write_report(tiny).read_text(encoding="utf-8") == tiny_html


def test_headline_says_the_summary(tiny: Path, tiny_html: str) -> None:
    words = Page(tiny_html).words
    summary = json.loads((tiny / "summary.json").read_text())
    for expected in (
        "zcode_m3 · tiny",
        f"{summary['bleu']['average']:.1f}",
        f"{summary['chrf']['average']:.1f}",
        "18.7 M",
        "7.41 M",
        "5.0 min",
        "39.8 k",
        "4 languages (en, vo, ka, zu)",
    ):
        assert expected in words
    for direction, value in summary["bleu"]["directions"].items():
        assert re.search(rf"{direction}\s*{value:.1f}", words), direction


def test_pictures_have_descriptions_captions_and_numbers(tiny_html: str) -> None:
    page = Page(tiny_html)
    drawings = page.all("svg")
    assert len(drawings) >= 10
    assert all(len(a.get("aria-label") or "") > 10 and a["role"] == "img" for a in drawings)
    assert len(page.all("figcaption")) == len(page.all("figure"))
    figures = re.findall(r"<figure.*?</figure>", tiny_html, flags=re.DOTALL)
    assert all("<table" in figure for figure in figures), "every picture stands beside its numbers"


def test_colours_follow_the_theme(tiny_html: str) -> None:
    body = tiny_html[tiny_html.index("<body>") :]
    assert "var(--blue)" in body
    assert not re.search(r"(fill|stroke): #(?!000000|ffffff)", body), "a colour that the dark theme cannot change"
    assert tiny_html.count("prefers-color-scheme: dark") == 2


def test_expert_maps(tiny: Path, tiny_html: str) -> None:
    routing = json.loads((tiny / "routing.json").read_text())
    layer = routing["layers"][3]
    start = tiny_html.index(f"<h4>{layer['name']}")
    rows = re.findall(r'<tr><th scope="row"[^>]*>(\w+)</th>(.*?)</tr>', tiny_html[start:])[: len(BABEL)]
    header = re.findall(r'class="x" scope="col">(\d+)<', tiny_html[start:])[:8]
    assert sorted(header) == [str(i) for i in range(8)]
    for language, cells in rows:
        shown = re.findall(r'<td class="(\w+)">([\d.]+)', cells)
        shares = layer["load_by_language"][language]
        assert [v for _, v in shown] == [f"{8 * shares[int(e)]:.1f}" for e in header]
        hottest = max(range(8), key=lambda i: shares[int(header[i])])
        assert shown[hottest][0] == max((c for c, _ in shown), key=lambda c: int(c[1:]))


def test_fifteen_languages_through_english(tmp_path: Path) -> None:
    make_run(tmp_path, languages=WORLD, pivot="en", steps=300, layers=8, experts=32)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    words = Page(html).words
    assert "test set, 28 directions" in words
    assert "into en from en" in words
    assert len(re.findall("<h4>", html)) == 8
    assert len(html) < 2_000_000


@pytest.mark.parametrize("missing", [FILES[:2], FILES[2:3], FILES[4:]])
def test_any_file_may_be_missing(tmp_path: Path, missing: tuple[str, ...]) -> None:
    make_run(tmp_path, steps=25, languages=("en", "de"), without=missing)
    words = report(tmp_path).words
    assert all(f"no {name}" in words for name in missing)


def test_after_fit_only(tmp_path: Path) -> None:
    make_run(tmp_path, steps=60, without=("summary.json", "routing.json", "samples.json"))
    words = report(tmp_path).words
    assert "This run is not finished" in words
    assert "last validation" in words
    assert "This run folder has no samples.json." in words


def test_dense_model_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, steps=25, experts=0, without=("routing.json",))
    page = report(tmp_path)
    assert "This model is dense" in page.words
    assert "routing" not in [a["id"] for a in page.all("section")]


@pytest.mark.parametrize("steps", [1, 2])
def test_hardly_any_step(tmp_path: Path, steps: int) -> None:
    assert len(report(make_run(tmp_path, steps=steps)).all("svg")) >= 8


def test_losses_that_are_no_numbers(tmp_path: Path) -> None:
    bad = {40: math.nan, 41: math.inf, 42: -math.inf}
    rows = [{"step": i, "train/translation/loss": bad.get(i, 5 - i / 50)} for i in range(100)]
    write_rows(tmp_path / "metrics.csv", [*rows, {"step": 100, "valid/translation/loss": math.nan}])
    page = report(tmp_path)
    assert "was not a number at 3 logged steps" in page.words
    assert page.words.count("not a number") >= 2, "the plot marks the steps"
    drawing = next(a for a in page.all("svg") if "Translation" in (a["aria-label"] or ""))
    assert drawing


def test_nothing_but_bad_numbers(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.csv", [{"step": i, "train/loss": math.nan} for i in range(5)])
    summary = {
        "bleu": {"average": math.nan, "directions": {"a-b": None}},
        "parameters": "many",
        "wall_seconds": math.inf,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "nan" not in report(tmp_path).words.lower().replace("denan", "")


def test_texts_are_escaped_everywhere(tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script>\"&amp;</td>"
    make_run(tmp_path, languages=("en", "<b>", 'x"y'), steps=5)
    sample = {"direction": 'en-x"y', "source": nasty, "reference": nasty, "hypothesis": nasty}
    (tmp_path / "samples.json").write_text(json.dumps([sample]))
    (tmp_path / "config.yaml").write_text(f"recipe: {nasty}\n")
    (tmp_path / "environment.json").write_text(json.dumps({nasty: nasty}))
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "variant": nasty, "data": {"source": nasty}}))
    write_rows(tmp_path / "metrics.csv", [{"step": 1, f"train/{nasty}/loss": 1.0}])
    page = report(tmp_path)
    assert not page.all("script")
    assert not page.all("b")
    assert page.words.count("alert('x')") >= 7
    assert nasty in page.words


def test_scripts_of_the_world(tmp_path: Path) -> None:
    make_run(tmp_path, languages=tuple(SENTENCES), pivot="en", steps=2)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    blocks = re.findall(r"<dd([^>]*)>(.*?)</dd>", html)
    assert all('dir="auto"' in attrs for attrs, content in blocks if "lang=" in attrs)
    shown = {re.sub("<[^>]*>", "", content) for _, content in blocks}
    for reference, _ in SENTENCES.values():
        assert reference in {unescape(s) for s in shown}
    # A mark never begins with a combining mark: that would tear a letter apart.
    assert not re.search("<mark>[\u0300-\u036f\u0900-\u0903\u093a-\u094f\u064b-\u0652]", html)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    long = "word " * 20_000
    (tmp_path / "samples.json").write_text(
        json.dumps([{"direction": "a-b", "source": long, "reference": long, "hypothesis": ""}])
    )
    page = report(tmp_path)
    assert "99,100 more characters" in page.words
    assert "(empty)" in page.words
    assert len(page.words) < 12_000


def test_lone_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text('[{"direction": "a-b", "hypothesis": "x \\ud800 y"}]')
    assert "x ? y" in report(tmp_path).words


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, steps=2)
    (tmp_path / "report.html").write_text("old")
    before = sorted(p.name for p in tmp_path.iterdir())

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match="cannot write report.html in the folder .*: the disk is full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == before
