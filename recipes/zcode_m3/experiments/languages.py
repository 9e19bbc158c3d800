"""Fifty languages in one run: BLEU and chrF by direction and by how much text a language has, beside the dense twin.

    python recipes/zcode_m3/experiments/languages.py
    python recipes/zcode_m3/experiments/languages.py --steps 200 --sentences 4     # does it run?

One language has the most text and is in every direction; the other 49 are, in turn, of three tiers. Both models are
trained by the command that a user would type, with ``--twin``: equal steps, seeds, text and first weights. A run that
was interrupted goes on. Runs go to --runs; languages.json, languages.md and languages.svg to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.data.sources import open_source
from moekit.report.style import COLOURS, CYCLE, Canvas

LANGUAGES = 50
TIERS = {"large": 6_000, "middle": 1_500, "small": 300}
"""Training sentences of a language, by the name of its tier."""
PIVOT_SENTENCES = 20_000
RESULTS = Path(__file__).resolve().parents[1] / "results" / "languages"


def tiers(languages: Sequence[str]) -> dict[str, str]:
    """The tier of every language but the first, in turn."""
    names = list(TIERS)
    return {code: names[number % len(names)] for number, code in enumerate(languages[1:])}


def settings(languages: Sequence[str], steps: int, sentences: int) -> list[str]:
    """Options of the run."""
    pivot, tier = languages[0], tiers(languages)
    directions = [name for code in tier for name in (f"{code}-{pivot}", f"{pivot}-{code}")]
    sizes = {code: TIERS[own] for code, own in tier.items()}
    return [
        "--data.babel_languages", str(len(languages)), "--data.babel_sentences", str(PIVOT_SENTENCES),
        "--data.directions", ",".join(directions), "--data.babel_sizes", json.dumps(sizes),
        "--data.vocab_size", "4000", "--train.max_minutes", "0", "--train.max_steps", str(steps),
        "--evaluate.beam_size", "1", "--evaluate.max_sentences", str(sentences), "--evaluate.valid_sentences", "4",
    ]  # fmt: skip


def scores(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """BLEU and chrF by direction, of a run's summary."""
    bleu, chrf = (summary[name]["directions"] for name in ("bleu", "chrf"))
    return {name: {"bleu": float(bleu[name]), "chrf": float(chrf[name])} for name in chrf}


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Means by tier and side: how many directions, both scores of both models, and where the sparse one is ahead."""
    found = []
    for tier in TIERS:
        for side, place in (("into the pivot", 0), ("from the pivot", 1)):
            names = [name for name in results["sparse"] if results["tiers"].get(name.split("-")[place]) == tier]
            both = {
                f"{arm}_{score}": statistics.fmean(results[arm][name][score] for name in names)
                for arm in ("sparse", "dense")
                for score in ("bleu", "chrf")
            }
            ahead = sum(results["sparse"][name]["chrf"] > results["dense"][name]["chrf"] for name in names)
            found.append({"tier": tier, "side": side, "directions": len(names), "ahead": ahead, **both})
    return found


def table(results: Mapping[str, Any]) -> str:
    """The means, and below them every direction."""
    lines = [
        "| tier | sentences | directions | BLEU sparse | BLEU dense | chrF sparse | chrF dense | ahead in chrF |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(results):
        means = " | ".join(f"{row[f'{arm}_{score}']:.1f}" for score in ("bleu", "chrf") for arm in ("sparse", "dense"))
        where = f"{row['tier']}, {row['side']} | {TIERS[row['tier']]:,} | {row['directions']}"
        lines.append(f"| {where} | {means} | {row['ahead']} |")
    lines += [
        "",
        "| direction | tier | BLEU sparse | BLEU dense | chrF sparse | chrF dense |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in results["sparse"].items():
        twin = results["dense"][name]
        tier = next(results["tiers"][code] for code in name.split("-") if code in results["tiers"])
        lines.append(
            f"| {name} | {tier} | {own['bleu']:.1f} | {twin['bleu']:.1f} | {own['chrf']:.1f} | {twin['chrf']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def drawing(results: Mapping[str, Any], file: Path) -> None:
    """Each direction as a point: chrF of the dense twin, and of the sparse model."""
    with Canvas(4.0) as canvas:
        for colour, tier in zip(CYCLE, TIERS, strict=False):
            names = [n for n in results["sparse"] if tier in map(results["tiers"].get, n.split("-"))]
            x, y = ([results[arm][name]["chrf"] for name in names] for arm in ("dense", "sparse"))
            canvas.axes.scatter(x, y, s=9, color=COLOURS[colour], label=f"{tier}: {TIERS[tier]:,} sentences")
        ends = [value["chrf"] for arm in ("sparse", "dense") for value in results[arm].values()]
        canvas.axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=COLOURS["muted"], linewidth=0.8)
        canvas.axes.set_xlabel("chrF of the dense twin")
        canvas.axes.set_ylabel("chrF of the sparse model")
        canvas.legend()
        title = "chrF by direction, sparse over dense"
        canvas.figure.savefig(file, format="svg", metadata={"Date": None, "Title": title}, facecolor=COLOURS["paper"])


def main() -> None:
    """Train both, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/languages"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--steps", type=int, default=4_000, help="optimizer steps of each model")
    parser.add_argument("--sentences", type=int, default=20, help="test sentences of a direction")
    given = parser.parse_args()
    languages = open_source("babel", None, languages=LANGUAGES, train_sentences=1).languages
    out = given.runs / f"steps-{given.steps}"
    options = settings(languages, given.steps, given.sentences)
    command = [sys.executable, "-m", "moekit", "run", "zcode_m3", "--twin", *options, "--out", str(out), "--resume"]
    subprocess.run(command, check=True)
    summaries = {
        arm: json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        for arm, folder in (("sparse", out), ("dense", out.with_name(f"{out.name}-dense")))
    }
    results = {
        "steps": given.steps,
        "sentences": given.sentences,
        "tiers": tiers(languages),
        "parameters": {arm: summary["parameters"] for arm, summary in summaries.items()},
        **{arm: scores(summary) for arm, summary in summaries.items()},
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "languages.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (given.out / "languages.md").write_text(table(results), encoding="utf-8")
    drawing(results, given.out / "languages.svg")
    print(table(results).split("\n\n")[0])


if __name__ == "__main__":
    main()
