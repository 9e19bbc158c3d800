"""report.html: complete, self-contained, safe with any text, and readable by a machine that checks HTML."""

import json
import math
import os
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_runs import BABEL, SENTENCES, WORLD, edit, make_run, summary_of, write_rows
from shown_text import screen, words

from moekit.errors import UserError
from moekit.report import results_markdown, write_comparison, write_report
from moekit.report.plots import Curves, Line
from moekit.report.reading import FILES
from moekit.report.run_folder import Series
from moekit.report.wording import MISSING

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
    assert tiny_html.startswith("<!doctype html>")
    assert "http:" not in tiny_html
    assert "https:" not in tiny_html
    assert "@import" not in tiny_html
    assert not re.search(r"url\((?!#)", tiny_html)
    page = Page(tiny_html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert any("default-src 'none'" in (a.get("content") or "") for a in page.all("meta"))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_ids_are_unique(tiny_html: str) -> None:
    ids = [attrs["id"] for _, attrs in Page(tiny_html).tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 20, "a clip path of one drawing is not another's"
    assert {link.strip("#)") for link in re.findall(r"url\((#[^)]*\))", tiny_html)} <= set(ids)


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


NASTY = "<script>alert('x')</script>\"&amp;</td>"
NAMES = ("title", "explanation")
SAMPLE_NAMES = ("title", "lead", "source", "reference", "noun", "unknown")


def hostile_run(folder: Path, text: str) -> Path:
    """A run in which everything that a page quotes is `text`: tasks, languages, samples, settings, environment."""
    make_run(folder, languages=("en", "<b>", 'x"y', text), without=("metrics.csv",))
    record = {**dict.fromkeys(NAMES, text), "perplexity": True, "samples": dict.fromkeys(SAMPLE_NAMES, text)}
    texts = {"source": text, "reference": text, "hypothesis": text}
    samples = [{"direction": 'en-x"y', **texts}, {"task": text, "direction": text, **texts}]
    (folder / "samples.json").write_text(json.dumps(samples))
    (folder / "config.yaml").write_text(f"recipe: {text}\n", errors="replace")
    (folder / "environment.json").write_text(json.dumps({text: text}))
    bleu = {**summary_of(folder)["bleu"], "signature": text}
    changes = {"variant": text, "data": {"source": text}, "tasks": {"translation": record, text: record}, "bleu": bleu}
    edit(folder, "summary.json", **changes)
    row = {"step": 1, "train/translation/loss": 1.0, "train/translation/accuracy": 0.5}
    if text.isprintable():
        row[f"train/{text.replace('/', '')}/loss"] = 1.0
    write_rows(folder / "metrics.csv", [row])
    return folder


def test_glosses_stand_below_their_texts_where_they_are_known(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "<i>gloss</i>" not in write_report(run).read_text()
    said = {"source_gloss": "dog.PL sleep <b>", "reference_gloss": "the dog", "hypothesis_gloss": "[xyz?] dog"}
    samples = json.loads((run / "samples.json").read_text())
    glossed = [{**samples[0], **said}, *samples[1:], {**samples[1], "source_gloss": 3}]
    (run / "samples.json").write_text(json.dumps(glossed))
    page = write_report(run).read_text()
    Page(page)
    shown = re.findall(r'<small class="gloss"[^>]*><i>gloss</i> (.*?)</small></dd>', page)
    assert shown == ["dog.PL sleep &lt;b&gt;", "the dog", "[xyz?] dog"]


def test_texts_are_escaped_everywhere(tmp_path: Path) -> None:
    page = report(hostile_run(tmp_path, NASTY))
    assert not page.all("script")
    assert not page.all("b")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert [a["content"] for a in page.all("meta") if "http-equiv" in a] == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    ]
    assert page.words.count("alert('x')") >= 25
    assert NASTY in page.words
    assert {a.get("lang") for a in page.all("dd")} >= {"en", 'x"y', NASTY}


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}{% raw %}{# x #}", "{text} {0} %s $HOME", "</style><style>*{color:red}"])
def test_texts_are_no_templates(tmp_path: Path, text: str) -> None:
    page = report(hostile_run(tmp_path, text))
    assert text in page.words
    assert len(page.all("style")) == 1


@pytest.mark.parametrize(
    "text", ["a\x00\x01\x1b[31mb", "half \ud800 pair", "\ufffe\uffff", "$x^{", "\u202eright to left"]
)
def test_texts_that_no_font_has_do_not_stop_the_page(tmp_path: Path, text: str) -> None:
    run = hostile_run(tmp_path, text)
    assert len(report(run).all("svg")) >= 3
    assert screen(run)
    assert results_markdown(run)
    assert write_comparison([run, run], tmp_path / "c.html").is_file()


def test_texts_are_escaped_in_comparisons_and_markdown(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "a", NASTY)
    page = Page(write_comparison([run, make_run(tmp_path / "b", steps=3)], tmp_path / "c.html").read_text())
    assert not page.all("script")
    assert NASTY in page.words
    for text in (results_markdown(run), (tmp_path / "c.md").read_text()):
        outside = re.sub("(?s)```.*?```|`[^`]*`", "", text)
        assert "<script>" not in outside
        assert "&lt;script&gt;" in outside


def test_the_record_names_the_tasks(tmp_path: Path) -> None:
    """A task that the report has never heard of is presented as the summary says."""
    named = ("Answers", "What it said.", "Question", "Right answer", "answer", "unknown")
    texts = dict(zip(SAMPLE_NAMES, named, strict=True))
    record = {"title": "Quiz", "explanation": "Answer a question.", "perplexity": False, "samples": texts}
    summary = {"tasks": {"quiz": record}, "test": {"quiz": {"loss": 1.0, "perplexity": 2.7}}, "loss": {"quiz": 1.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    sample = {"task": "quiz", "direction": "", "source": "s", "reference": "r", "hypothesis": "h"}
    (tmp_path / "samples.json").write_text(json.dumps([sample]))
    write_rows(tmp_path / "metrics.csv", [{"step": i, "valid/quiz/loss": 3 - i} for i in (1, 2)])
    shown, text = words(write_report(tmp_path).read_text()), results_markdown(tmp_path)
    for expected in ("Quiz Answer a question.", "Answers What it said. unknown", "Question s Right answer r"):
        assert expected in shown
    assert f"| Quiz | 1 | {MISSING} |" in text
    assert "- question: s<br>" in text
    assert "validation  quiz loss 1" in screen(tmp_path)


def test_a_broken_record_of_tasks_is_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    for tasks in ([], {"translation": 3}, {"translation": {"title": 4, "samples": "x", "perplexity": "no"}}):
        edit(tmp_path, "summary.json", tasks=tasks)
        assert "Sample translations" in report(tmp_path).words


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


def test_page_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    before = os.umask(0o027)
    try:
        assert write_report(tmp_path).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


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
    with pytest.raises(UserError, match=r"cannot write report\.html in the folder .*: the disk is full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_name_that_begins_with_an_underscore_is_in_the_legend() -> None:
    """Matplotlib leaves such labels out."""
    series = Series(np.arange(5.0), np.arange(5.0))
    assert "_base" in Curves([Line("_base", series), Line("other", series)], "two runs").svg()
