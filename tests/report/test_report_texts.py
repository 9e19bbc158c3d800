"""Word agreement, numbers in words, the terminal, markdown, comparisons and the command line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_runs import BABEL, WORLD, make_run
from rich.console import Console

from moekit.errors import UserError
from moekit.report import results_markdown, terminal_summary, wording, write_comparison
from moekit.report.__main__ import main
from moekit.report.render import literal
from moekit.report.samples import agreement, marked, pieces
from moekit.shell import command_line


def screen(run: object, *, encoding: str = "utf-8", width: int = 80) -> list[str]:
    """What `terminal_summary` prints, without the blanks at the ends of lines."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    terminal_summary(run, Console(file=file, width=width, force_terminal=False, color_system=None))
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


# -- agreement ---------------------------------------------------------------------------------------------------------


def agreeing(reference: str, hypothesis: str) -> list[str]:
    return [piece for piece, agrees in agreement(reference, hypothesis).hypothesis if agrees]


def test_agreeing_words_stand_in_order() -> None:
    found = agreement("the cat sat on the mat .", "The mat sat on a cat.")
    assert [piece for piece, agrees in found.hypothesis if agrees] == ["The", "sat", "on"]
    assert (found.matched, found.num_words) == (3, 6)
    assert "".join(piece for piece, _ in found.hypothesis) == "The mat sat on a cat."


def test_agreement_ignores_composition_and_case() -> None:
    assert agreeing("Caf\u00e9 noir", "cafe\u0301 NOIR") == ["cafe\u0301", "NOIR"]
    assert agreeing("...", "...") == []
    assert agreeing("", "word") == []


def test_unspaced_scripts_are_compared_letter_by_letter() -> None:
    assert agreeing("三只小狗", "三只大狗") == ["三", "只", "狗"]
    thai = "ที่นี่"
    assert "".join(pieces(thai)) == thai
    assert all(piece[0] not in "\u0e31\u0e34\u0e35\u0e48" for piece in pieces(thai))


@pytest.mark.parametrize(
    "text", ["", " ", "a", "don't  stop-it!", "हरा घर", "àwọn ajá kékeré mẹ́ta", "\u0301a", "a\u200d b"]
)
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text


def test_very_long_sentences_are_not_aligned() -> None:
    assert agreement("a " * 5000, "a " * 5000).matched == 0


def test_marks_join_neighbours_and_escape() -> None:
    assert marked(agreement("a <b> c", "a <b> d").hypothesis) == "<mark>a &lt;b</mark>&gt; d"


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (99_960, "100 k"),
        (999_960, "1.00 M"),
        (7_411_200, "7.41 M"),
        (10_015_000_000, "10.0 B"),
        (0.25, "0.25"),
        (None, wording.MISSING),
        (float("nan"), wording.MISSING),
    ],
)
def test_short(value: float | None, expected: str) -> None:
    assert wording.short(value) == expected


def test_other_numbers() -> None:
    assert wording.percent(0.0132) == "1.3 %"
    assert wording.percent(0.0001) == "< 0.1 %"
    assert wording.percent(0.0) == "0.0 %"
    assert [wording.duration(s) for s in (42, 480, 7200, None)] == ["42 s", "8.0 min", "2.0 h", wording.MISSING]
    assert [wording.perplexity(p) for p in (3.004, 250.6, 1e6, None)] == ["3.00", "251", "1.00 M", wording.MISSING]
    assert [wording.significant(v) for v in (0.0, 1.23456, 2e-9)] == ["0", "1.235", "2.00e-09"]
    assert [wording.count(n, "expert") for n in (0, 1, 1200)] == ["no experts", "1 expert", "1,200 experts"]


# -- terminal ----------------------------------------------------------------------------------------------------------

CASES = {
    "babel": {"languages": BABEL},
    "world": {"languages": WORLD, "pivot": "en", "layers": 12, "experts": 64},
    "pair": {"languages": ("en", "de")},
    "dense": {"experts": 0},
    "fit": {"without": ("summary.json", "routing.json", "samples.json")},
    "metrics": {"without": ("metrics.csv",)},
    "long names": {"languages": ("en_Latn_the_first_language", "zh_Hant_the_second_language", "x" * 40)},
}


@pytest.mark.parametrize("case", CASES)
def test_one_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs", steps=40, **CASES[case])
    (tmp_path / "runs" / "checkpoints").mkdir()
    lines = screen(Path("runs"))
    if case != "long names":  # a command is printed whole, and holds a language of forty letters
        assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    assert "BLEU" in "\n".join(lines)
    assert command_line("compare", "runs") in "\n".join(lines)


def test_terminal_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "r", steps=40)
    text = "\n".join(screen(tmp_path / "r"))
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    for direction, value in summary["bleu"]["directions"].items():
        assert any(direction in line and f"{value:.1f}" in line for line in text.splitlines())
    assert "0 of 32 dead" in text
    assert "of log E" in text
    assert "denoising" in text


def test_many_directions_show_extremes_and_averages(tmp_path: Path) -> None:
    make_run(tmp_path, languages=WORLD, pivot="en", steps=3)
    directions = json.loads((tmp_path / "summary.json").read_text())["bleu"]["directions"]
    text = "\n".join(screen(tmp_path))
    assert max(directions, key=lambda d: directions[d]) in text
    assert min(directions, key=lambda d: directions[d]) in text
    assert "average into" in text


def test_summary_alone(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    text = "\n".join(screen(json.loads((tmp_path / "summary.json").read_text())))
    assert "zcode_m3 · tiny" in text
    assert "moekit.report" not in text
    assert screen({})[0].startswith("── run")


def test_terminal_without_unicode(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3, languages=("en", "fr"))
    assert any("BLEU" in line for line in screen(tmp_path, encoding="ascii"))


def test_terminal_shows_texts_as_they_are(tmp_path: Path) -> None:
    make_run(tmp_path, languages=("en", "[red]x[/]", "\ud800", ":smile:"), without=("metrics.csv",))
    text = "\n".join(screen(tmp_path))
    assert "[red]x[/]" in text
    assert ":smile:" in text


def test_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "r", steps=3)
    lines = screen(Path("r"), width=44)
    results = lines[: next(i for i, line in enumerate(lines) if line.startswith("report"))]
    assert max(map(len, results)) <= 44


# -- markdown ----------------------------------------------------------------------------------------------------------


def test_markdown_is_literal() -> None:
    assert literal("a|b *c* <i> `d`\n#1") == r"a\|b \*c\* &lt;i&gt; \`d\` \#1"
    assert len(literal("x" * 5000)) < 500


def test_markdown_escapes_what_it_shows(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3, languages=("en", "a|b", "<i>"))
    lines = results_markdown(tmp_path).splitlines()
    assert any(line.startswith(r"| en-a\|b | ") and line.count("|") == 5 for line in lines)
    assert not any("<i>" in line for line in lines)


def test_results_markdown(tmp_path: Path) -> None:
    make_run(tmp_path, steps=30)
    text = results_markdown(tmp_path, samples_per_direction=1)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"| BLEU, average | {summary['bleu']['average']:.1f} |" in text
    assert all(f"| {d} | {v:.1f} |" in text for d, v in summary["bleu"]["directions"].items())
    assert summary["bleu"]["signature"] in text
    assert text.count("source:") == len(summary["bleu"]["directions"])
    assert command_line("run", "zcode_m3", "--out", "runs/a name") in text
    assert all(line.count("|") == 9 for line in text.splitlines() if line.startswith("| encoder."))


# -- comparison --------------------------------------------------------------------------------------------------------


def test_comparison(tmp_path: Path) -> None:
    moe = make_run(tmp_path / "moe", steps=60)
    dense = make_run(tmp_path / "dense", steps=60, variant="tiny_dense", experts=0, gain=-5, without=("routing.json",))
    path = write_comparison([moe, dense], tmp_path / "out")
    assert path == tmp_path / "out" / "comparison.html"
    html, text = path.read_text(), path.with_suffix(".md").read_text()
    scores = [json.loads((d / "summary.json").read_text())["bleu"]["directions"] for d in (moe, dense)]
    for direction in scores[0]:
        a, b = (s[direction] for s in scores)
        difference = f"{b - a:+.1f}".replace("-", "\u2212")
        assert f"| {direction} | {a:.1f} | {b:.1f} ({difference}) |" in text
        assert f"{b:.1f} ({difference})" in html
    assert "tiny vs tiny_dense" in html
    assert "| dead experts | 0 | dense |" in text
    assert "different data" not in text
    assert "http:" not in html


def test_comparison_warns_of_different_data_and_signatures(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", steps=3)
    second = make_run(tmp_path / "b", steps=3)
    summary = json.loads((second / "summary.json").read_text())
    summary["data"]["fingerprint"] = "other"
    summary["bleu"]["signature"] = "tok:none"
    (second / "summary.json").write_text(json.dumps(summary))
    text = write_comparison([first, second], tmp_path / "x.html").with_suffix(".md").read_text()
    assert "different data" in text
    assert "bleu signatures differ" in text
    bleu, chrf = (text.partition(f"{title}\n")[2].partition("\n\n\n")[0].split("\n#")[0] for title in ("BLEU", "chrF"))
    assert "(" in chrf  # differences from the first run, where both were computed alike
    assert "| average |" in bleu
    assert "(" not in bleu


def test_comparison_of_unfinished_runs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", steps=3, without=("summary.json", "metrics.csv"))
    second = make_run(tmp_path / "b", steps=3)
    assert write_comparison([first, second, second], tmp_path / "x.html").is_file()


@pytest.mark.parametrize("count", [1, 9])
def test_comparison_takes_two_to_eight(tmp_path: Path, count: int) -> None:
    make_run(tmp_path / "a", steps=1)
    with pytest.raises(UserError, match=f"2 to 8 runs: got {count}"):
        write_comparison([tmp_path / "a"] * count, tmp_path)


# -- command line ------------------------------------------------------------------------------------------------------


def test_command_makes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, steps=3)
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert "BLEU" in capsys.readouterr().out


def test_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / name, steps=3)) for name in "ab"]
    assert main([*runs, "--out", str(tmp_path / "c.html")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "c.html"), str(tmp_path / "c.md")]


def test_command_prints_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, steps=3)
    assert main([str(tmp_path), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# zcode\\_m3 · tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "is not a folder"),
        ([".", "--out", "x.html"], "--out is for comparisons"),
        ([".", ".", "--markdown"], "--markdown prints one run"),
    ],
)
def test_command_errors(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_command_from_a_shell(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "moekit.report", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "has none of them" in done.stderr


def test_command_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "examples:" in capsys.readouterr().out
