"""Runs that do not translate: language models and span corruption, judged by perplexity, never by BLEU."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from fake_runs import BABEL, WORLD, edit, make_run, make_text_run, summary_of, write_rows
from shown_text import screen, words

from moekit.cli.program import main
from moekit.report import results_markdown, write_comparison, write_report
from moekit.report.health import findings
from moekit.report.predictions import languages_by_perplexity, main_task, predictions
from moekit.report.reading import read_run
from moekit.report.results import quality
from moekit.report.wording import MISSING
from moekit.shell import command_line

FOREIGN = re.compile("translat|bleu|chrf", flags=re.IGNORECASE)
CASES: dict[str, dict[str, Any]] = {
    "language model": {},
    "dense": {"experts": 0},
    "span corruption": {"task": "denoising"},
    "one language": {"languages": ("en",)},
    "many languages": {"languages": WORLD, "layers": 12, "experts": 64, "experts_per_token": 1.5},
    "hash": {"by_rule": True},
    "fit": {"without": ("summary.json", "routing.json", "samples.json")},
    "no metrics": {"without": ("metrics.csv", "routing.json")},
    "samples alone": {
        "without": ("config.yaml", "environment.json", "metrics.csv", "summary.json", "routing.json"),
    },
}


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_text_runs_are_told_from_translation(tmp_path: Path, case: str) -> None:
    assert not read_run(make_text_run(tmp_path, steps=20, **CASES[case])).translates


@pytest.mark.parametrize("only", ["config.yaml", "metrics.csv", "summary.json", "samples.json"])
def test_translation_is_told_from_any_file(tmp_path: Path, only: str) -> None:
    files = ("config.yaml", "environment.json", "metrics.csv", "summary.json", "routing.json", "samples.json")
    run = make_run(tmp_path, steps=3, without=tuple(name for name in files if name != only))
    assert read_run(run).translates


def test_a_translation_task_beside_others_translates(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.csv", [{"step": 1, "train/denoising/loss": 3.0, "train/translation/loss": 4.0}])
    assert read_run(tmp_path).translates
    write_rows(tmp_path / "metrics.csv", [{"step": 1, "train/denoising/loss": 3.0, "train/aux/loss": 4.0}])
    assert not read_run(tmp_path).translates


def test_predictions_of_the_summary(tmp_path: Path) -> None:
    test = {
        "replaced_token": {"loss": 0.3, "perplexity": 1.35, "accuracy": 0.9, "languages": {"en": 1.35}},
        "denoising": {"loss": 2.0, "accuracy": None, "languages": {"en": 9.0, "de": 7.0, "xx": math.nan}},
        "masked_lm": {"loss": 3.0, "perplexity": 20.1, "accuracy": 0.5, "languages": {}},
        "odd": None,
    }
    (tmp_path / "summary.json").write_text(json.dumps({"test": test, "loss": {"denoising": 9.0}}))
    found = predictions(read_run(tmp_path))
    assert [x.task for x in found] == ["denoising", "masked_lm", "replaced_token"]
    assert found[0].perplexity == pytest.approx(math.exp(2.0))
    assert found[0].languages == {"en": 9.0, "de": 7.0}
    assert languages_by_perplexity(found[0]) == ["de", "en"]
    assert (found[1].perplexity, found[1].accuracy, found[1].origin) == (20.1, 0.5, "test")
    assert (found[2].perplexity, found[2].languages) == (None, {})


def test_predictions_of_the_metrics(tmp_path: Path) -> None:
    valid = {"step": 5, "valid/causal_lm/loss": 2.0, "valid/causal_lm/accuracy": 0.4}
    write_rows(tmp_path / "metrics.csv", [valid])
    found = main_task(read_run(tmp_path))
    assert (found.origin, found.loss, found.accuracy) == ("valid", 2.0, 0.4)
    assert found.perplexity == pytest.approx(math.exp(2.0))
    tested = {"test/causal_lm/loss": 1.0, "test/causal_lm/perplexity/en": 2.5, "test/causal_lm/perplexity/de": 3.5}
    write_rows(tmp_path / "metrics.csv", [valid, {"step": 6, **tested}])
    found = main_task(read_run(tmp_path))
    assert (found.origin, found.loss, found.languages) == ("test", 1.0, {"en": 2.5, "de": 3.5})
    assert found.perplexity == pytest.approx(math.e)


def test_nothing_measured_yet(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.csv", [{"step": 1, "train/causal_lm/loss": 7.0}])
    assert main_task(read_run(tmp_path)).task == ""
    assert "Nothing was tested yet" in words(write_report(tmp_path).read_text())
    assert "Not tested yet" in screen(tmp_path)


# -- wording -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_nothing_speaks_of_translation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_text_run(tmp_path / "run", steps=30, **CASES[case])
    (run / "checkpoints").mkdir()
    other = make_text_run(tmp_path / "other", steps=3, without=CASES[case].get("without", ()))
    comparison = write_comparison([run, other], tmp_path / "c.html")
    told = (
        words(write_report(run).read_text()),
        screen(run),
        results_markdown(run),
        words(comparison.read_text()),
        comparison.with_suffix(".md").read_text(),
    )
    for text in told:
        assert not FOREIGN.search(text)
        assert "nan" not in text.split()


def test_pictures_of_a_language_model_have_descriptions_and_numbers(tmp_path: Path) -> None:
    html = write_report(make_text_run(tmp_path, steps=60)).read_text()
    figures = re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL)
    assert all("<table" in figure for figure in figures)
    assert 'aria-label="Perplexity of 4 languages' in html
    assert not re.search(r"(fill|stroke): #(?!000000|ffffff)", html[html.index("<body>") :])


# -- the page ----------------------------------------------------------------------------------------------------------


def test_page_says_the_summary(tmp_path: Path) -> None:
    run = make_text_run(tmp_path, steps=60)
    html = write_report(run).read_text()
    text, test = words(html), summary_of(run)["test"]["causal_lm"]
    assert f"Perplexity {test['perplexity']:.2f} test set, 4 languages" in text
    assert "Accuracy 47.5 % of next word Loss 2.5 nats per token" in text
    order = sorted(test["languages"], key=lambda x: test["languages"][x])
    rows = " ".join(f"{language} {test['languages'][language]:.2f}" for language in order)
    assert f"language perplexity {rows}" in text
    assert "Blind guessing would score 1,024" in text
    assert "last validation" not in text


def test_scores_of_a_validation_say_so(tmp_path: Path) -> None:
    text = words(write_report(make_text_run(tmp_path, steps=30, without=("summary.json",))).read_text())
    assert "not of the test set" in text
    assert "Scores of the last validation" in text


def test_accuracies_stand_beside_what_always_the_most_frequent_answer_gets(tmp_path: Path) -> None:
    run = make_text_run(tmp_path / "a", steps=30)
    test = summary_of(run)["test"]
    test["causal_lm"] |= {"majority": 0.061, "chance": 0.0009}
    edit(run, "summary.json", test=test, majority={"causal_lm": 0.0625}, chance={"causal_lm": 0.0009})
    text = words(write_report(run).read_text())
    assert "Accuracy 47.5 % of next word, 6.1 % by always the most frequent answer" in text
    assert "task loss perplexity accuracy majority chance" in text
    assert "47.5 % 6.1 % 0.1 %" in text
    assert "most frequent answer" in write_report(run).read_text().partition("Accuracy of every task over steps")[2]
    assert not any("accuracy" in finding.text for finding in findings(read_run(run)))
    other = make_text_run(tmp_path / "b", steps=30)
    table = write_comparison([run, other], tmp_path / "x.html").with_suffix(".md").read_text()
    assert "| Next word: majority | 6.1 % | – |" in table  # noqa: RUF001 (the dash of a missing number)


def test_a_run_that_guesses_has_no_green_ticks(tmp_path: Path) -> None:
    run = make_text_run(tmp_path, steps=30)
    test = summary_of(run)["test"]
    test["causal_lm"] |= {"accuracy": 0.05, "majority": 0.061}
    found = findings(read_run(edit(run, "summary.json", test=test)))
    assert found[0].text == "Next word: accuracy 5.0 %; always the most frequent answer would get 6.1 %."
    assert not any(finding.good for finding in found)


@pytest.mark.parametrize(
    ("average", "copied", "message"),
    [
        (0.0, 0.0, "BLEU is 0 in every direction"),
        (3.0, 3.5, "BLEU 3.0 is not above that of copying the source, 3.5."),
        (3.0, 2.5, None),
        (3.0, None, None),
    ],
)
def test_a_bleu_of_nothing_has_no_green_ticks(
    tmp_path: Path, average: float, copied: float | None, message: str | None
) -> None:
    run = make_run(tmp_path, steps=30)
    bleu = {**summary_of(run)["bleu"], "average": average}
    bleu["directions"] = dict.fromkeys(bleu["directions"], average)
    more = {} if copied is None else {"copied": {"bleu": {"average": copied, "directions": {}}}}
    found = findings(read_run(edit(run, "summary.json", bleu=bleu, **more)))
    assert any(finding.good for finding in found) == (message is None)
    assert message is None or found[0].text.startswith(message)
    page = words(write_report(run).read_text())
    assert (f"Copying the source would score BLEU {copied}." in page) == (copied is not None)


def test_one_language_has_no_bars_and_no_language_map(tmp_path: Path) -> None:
    html = write_report(make_text_run(tmp_path, steps=30, languages=("en",))).read_text()
    assert "test set, en" in words(html)
    assert "Perplexity by language" not in html
    assert "Which language goes to which expert" not in html
    assert "no load by language" not in html


def test_samples_are_continuations(tmp_path: Path) -> None:
    run = make_text_run(tmp_path, steps=3, languages=("en", "zh-Hant"))
    html = write_report(run).read_text()
    assert '<h2 id="samples-title">Sample continuations' in html
    assert "<dt>Prompt</dt>" in html
    assert "<dt>True continuation</dt>" in html
    assert "<h3>zh-Hant</h3>" in html, "a hyphen in one language is no direction"
    assert html.count('lang="zh-Hant"') == 12
    assert 'lang="zh"' not in html


def test_samples_are_restored_text(tmp_path: Path) -> None:
    html = write_report(make_text_run(tmp_path, task="denoising", steps=3)).read_text()
    assert "Samples of restored text" in html
    assert "<dt>Damaged</dt>" in html
    assert "three &lt;extra_0&gt;" in html
    assert "<dt>Original</dt>" in html
    assert "<dt>Prompt" not in html


def test_samples_of_several_tasks_stand_apart(tmp_path: Path) -> None:
    tasks = ("causal_lm", "denoising", "my_task")
    samples = [{"task": t, "direction": "en", "source": "s", "reference": "r", "hypothesis": t} for t in tasks]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    text = words(write_report(tmp_path).read_text())
    places = [text.index(x) for x in ("Sample continuations", "Prompt", "Samples of restored", "Damaged", "Expected")]
    assert places == sorted(places)
    assert "### My task: en" in results_markdown(tmp_path)


def test_perplexities_far_apart_are_drawn_on_a_logarithmic_scale(tmp_path: Path) -> None:
    run = make_text_run(tmp_path, steps=3)
    test = summary_of(run)["test"]
    even = write_report(run).read_text()
    test["causal_lm"]["languages"] = {"en": 1.0, "de": 52_000.0}
    html = write_report(edit(run, "summary.json", test=test)).read_text()
    assert "10.0 k" in html
    assert "52.0 k" in html
    assert "10.0 k" not in even


# -- the terminal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_one_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    make_text_run(tmp_path / "runs", steps=30, **CASES[case])
    (tmp_path / "runs" / "checkpoints").mkdir()
    lines = screen(Path("runs")).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    assert lines[1].startswith("perplexity ")
    assert command_line("compare", "runs") in "\n".join(lines)


def test_terminal_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_text_run(tmp_path / "r", steps=30, languages=BABEL)
    (run / "checkpoints").mkdir()
    text, test = screen(run), summary_of(run)["test"]["causal_lm"]
    head = f"perplexity {test['perplexity']:.2f}   accuracy 47.5 %   loss 2.5   test set, 4 languages"
    assert text.splitlines()[1] == head
    rows = re.findall(r"^(\w\w) +([\d.]+)$", text, flags=re.MULTILINE)
    assert rows == [(x, f"{v:.2f}") for x, v in sorted(test["languages"].items(), key=lambda item: item[1])]
    assert "validation  causal_lm perplexity 12.43" in text
    command = re.search(r"continue +(.*)\n +reads prompts from standard input", text)
    assert command is not None
    assert command.group(1) == command_line("generate", "r", "--from", "en")


def test_only_what_can_generate_offers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, options in (("restored", {"task": "denoising"}), ("untrained", {})):
        run = make_text_run(tmp_path / name, steps=3, **options)
        if name == "restored":
            (run / "checkpoints").mkdir()
        assert "generate" not in screen(run)


def test_many_languages_show_the_extremes(tmp_path: Path) -> None:
    run = make_text_run(tmp_path, languages=WORLD, steps=3)
    found = summary_of(run)["test"]["causal_lm"]["languages"]
    text = screen(run)
    order = sorted(found, key=lambda x: found[x])
    assert re.search(rf"lowest .*highest .*\n{order[0]} .*{order[-1]} ", text)
    assert "and 7 languages between" in text
    assert f"\n{order[7]} " not in text


def test_further_tasks_are_told(tmp_path: Path) -> None:
    run = make_text_run(tmp_path, steps=3)
    test = summary_of(run)["test"]
    test |= {"denoising": {"loss": 2.0, "perplexity": 7.39}, "replaced_token": {"loss": 0.25, "accuracy": 0.9}}
    edit(run, "summary.json", test=test)
    assert "also tested denoising perplexity 7.39 · replaced_token loss 0.25" in screen(run)
    assert f"| Replaced-token detection | 0.25 | {MISSING} | 90.0 % |" in results_markdown(run)
    assert f"Replaced-token detection 0.25 {MISSING} 90.0 %" in words(write_report(run).read_text())


def test_a_blow_up_in_the_middle_is_drawn(tmp_path: Path) -> None:
    """What is left out is the beginning, and no more."""
    run = make_text_run(tmp_path / "r")
    losses = [4.0, 3.0, 2.5, 2.2, 6.5, 5.5, 2.4, 2.2, 2.1]
    rows = [{"step": 100 * (i + 1), "valid/causal_lm/loss": loss} for i, loss in enumerate(losses)]
    write_rows(run / "metrics.csv", rows)
    cells = quality(read_run(run)).cells
    (figure,) = [f for cell in cells for f in cell if f.name == "perplexity/causal_lm"]
    assert figure.numbers is not None
    assert [row[0] for row in figure.numbers.rows] == [str(100 * i) for i in range(2, 10)]
    assert "without the first steps" in figure.see


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_markdown_is_utf_8_whatever_the_terminal_is(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make_text_run(tmp_path / "r"), io.BytesIO()
    edit_sample = json.loads((run / "samples.json").read_text(encoding="utf-8"))
    edit_sample[0]["hypothesis"] = "half \ud83d of a pair \u2581"
    (run / "samples.json").write_text(json.dumps(edit_sample))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding=encoding))
    assert main(["report", str(run), "--markdown"]) == 0
    assert "half ? of a pair \u2581" in out.getvalue().decode("utf-8")


# -- markdown and comparison -------------------------------------------------------------------------------------------


def test_results_markdown(tmp_path: Path) -> None:
    run = make_text_run(tmp_path, steps=3)
    text, test = results_markdown(run, samples_per_direction=1), summary_of(run)["test"]["causal_lm"]
    head = f"| Perplexity | {test['perplexity']:.2f} | test set, 4 languages |\n| Accuracy | 47.5 % | of next word |\n"
    assert f"{head}| Loss | 2.5 | nats per token |" in text
    assert all(f"| {x} | {value:.2f} |" in text for x, value in test["languages"].items())
    assert text.count("- prompt: ") == 4
    assert text.count("  true continuation: ") == 4


@pytest.mark.parametrize("gain", [-0.2, 0.2])
def test_comparison(tmp_path: Path, gain: float) -> None:
    moe = make_text_run(tmp_path / "moe", steps=30)
    dense = make_text_run(tmp_path / "dense", steps=30, variant="tiny_dense", experts=0, gain=gain)
    path = write_comparison([moe, dense], tmp_path / "c.html")
    html, text = path.read_text(), path.with_suffix(".md").read_text()
    tests = [summary_of(d)["test"]["causal_lm"] for d in (moe, dense)]
    pairs = [(x, tests[0]["languages"][x], tests[1]["languages"][x]) for x in BABEL]
    for name, a, b in [("all text", tests[0]["perplexity"], tests[1]["perplexity"]), *pairs]:
        sign = "+" if gain < 0 else "\u2212"
        told = f"{b:.2f} ({sign}{abs(b - a):.2f})"
        assert f"| {name} | {a:.2f} | {told} |" in text
        assert told in html
    assert f"Perplexity, tiny {tests[0]['perplexity']:.2f}" in words(html)
    assert "lower loss is better" in html
    assert "In brackets: the difference from tiny." in text
    assert "comparable" not in text


def test_comparison_of_unlike_runs_warns(tmp_path: Path) -> None:
    translation = make_run(tmp_path / "t", steps=3)
    model = make_text_run(tmp_path / "m", steps=3)
    restored = make_text_run(tmp_path / "r", steps=3, task="denoising", recipe="switch")
    fitted = make_text_run(tmp_path / "f", steps=3, without=("summary.json",))

    def warnings(*runs: Path) -> str:
        text = write_comparison(runs, tmp_path / "c.html").with_suffix(".md").read_text()
        return "\n".join(line for line in text.splitlines() if line.startswith(">"))

    assert "no score in common" in warnings(translation, model)
    assert "different tasks" in warnings(model, restored)
    assert "last validation" in warnings(model, fitted)
    assert warnings(model, model) == ""
    html = words(write_comparison([translation, model], tmp_path / "c.html").read_text())
    assert "BLEU, zcode_m3 · tiny" in html
    assert "Perplexity, moe_lm · tiny" in html
