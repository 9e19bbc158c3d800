"""What surgery and distillation are worth: every arm with paired seeds and equal budgets, then tables and pictures.

    python recipes/zcode_m3/experiments/surgery.py aggregation     # experts of two runs in one, against one run
    python recipes/zcode_m3/experiments/surgery.py pruning         # fewer experts, chosen in several ways
    python recipes/zcode_m3/experiments/surgery.py distillation    # into a dense model
    python recipes/zcode_m3/experiments/surgery.py early           # the same, of a teacher that has not learned enough
    python recipes/zcode_m3/experiments/surgery.py students        # into a shallower sparse model, staged and not

Arms are commands that a user would type. One that has finished is not run again, so an interrupted experiment goes on
where it was. Runs go to --runs; NAME.json, NAME.md and NAME.svg to --out. With OMP_NUM_THREADS set, several experiments
can run side by side.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from moekit.report.style import COLOURS, CYCLE, Canvas

RECIPE = [sys.executable, "-m", "moekit.recipes.zcode_m3"]
SURGERY = [sys.executable, "-m", "moekit.surgery"]
ONLY_TRANSLATION = [
    "--tasks.denoising.tokens", "0", "--tasks.masked_lm.tokens", "0", "--tasks.replaced_token.tokens", "0",
]  # fmt: skip
# One task, small steps and one schedule without an end: a run that goes on is then the run that never stopped.
COMMON = [
    *ONLY_TRANSLATION, "--tasks.translation.tokens", "1024", "--evaluate.valid_sentences", "50",
    "--train.max_minutes", "0", "--train.schedule", "inverse_square_root",
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to spend the budget.

    Attributes:
        label: in tables and pictures.
        folder: of its run, below the seed's.
        before: optimizer steps that were made before this run's own, its parents' and its own earlier ones.
        note: how it was made.
    """

    label: str
    folder: str
    before: int
    note: str


class Runs:
    """Runs of one experiment, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Folder of a run."""
        return self.folder / name

    def make(self, name: str, *commands: Sequence[str]) -> Path:
        """Run commands one after the other, unless they have all been run; {out} stands for the run's folder."""
        out, marker = self.path(name), self.folder / f"{name}.done"
        if not marker.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            for command in commands:
                filled = [str(out) if word == "{out}" else word for word in command]
                print("$", " ".join(filled), flush=True)
                subprocess.run(filled, check=True)
            marker.write_text("")
        return out


def fit(*settings: str, seed: int, order: int, steps: int, every: int) -> list[str]:
    """A run from scratch, trained and not tested."""
    return [
        *RECIPE, "fit", *COMMON, *settings, "--train.seed", str(seed), "--data.order_seed", str(order),
        "--train.max_steps", str(steps), "--train.validate_every", str(every), "--out", "{out}", "--overwrite",
    ]  # fmt: skip


def go_on(out: Path, steps: int) -> list[str]:
    """The same run, to a later step."""
    return [
        *RECIPE, "fit", "--config", str(out / "config.yaml"), "--out", str(out), "--resume",
        "--train.max_steps", str(steps),
    ]  # fmt: skip


def test(out: Path) -> list[str]:
    """Test a run on its last sentences."""
    return [*RECIPE, "test", "--out", str(out)]


def aggregation(runs: Runs, seed: int, n: int) -> list[Arm]:
    """Two runs of four experts, n steps each, in one of eight, n more; against 3 n steps of eight, and of four."""
    small = ["--model.num_experts", "4"]
    one = runs.make(f"{seed}/one", fit(*small, seed=seed, order=2 * seed, steps=n, every=n // 4))
    two = runs.make(f"{seed}/two", fit(*small, seed=seed, order=2 * seed + 1, steps=n, every=n // 4))
    ways = {
        "mean": ("aggregated", [], "shared weights averaged, gate rows side by side"),
        "plain": ("aggregated, plain", ["--plain"], "the same, nothing made up for halved weights"),
        "fresh": ("aggregated, fresh gates", ["--gates", "fresh"], "shared weights averaged, gates drawn anew"),
        "first": (
            "aggregated, shared of one",
            ["--shared", "1"],
            "shared weights of the first, gate rows side by side",
        ),
    }
    arms = []
    for name, (label, options, note) in ways.items():
        out = runs.path(f"{seed}/{name}")
        join = [*SURGERY, "aggregate", str(one), str(two), *options, "--out", "{out}", "--overwrite"]
        runs.make(f"{seed}/{name}", join, go_on(out, 2 * n), test(out))
        arms.append(Arm(label, name, n, note))
    eight = runs.path(f"{seed}/eight")
    runs.make(f"{seed}/eight", fit(seed=seed, order=2 * seed, steps=3 * n, every=n // 4), test(eight))
    four = runs.path(f"{seed}/four")
    runs.make(f"{seed}/four", fit(*small, seed=seed, order=2 * seed, steps=3 * n, every=n // 4), test(four))
    return [
        *arms,
        Arm("8 from scratch", "eight", 0, "eight experts from the start"),
        Arm("4 continued", "four", 0, "the first parent, trained on"),
    ]


def early_teacher(runs: Runs) -> Path:
    """The recipe's own tiny run."""
    return runs.make("teacher", [*RECIPE, "run", "--train.max_minutes", "0", "--out", "{out}", "--overwrite"])


def teacher(runs: Runs) -> Path:
    """That run, trained on for translation alone."""
    return runs.make(
        "teacher_of_translation",
        [
            *RECIPE, "finetune", "--init_from", str(early_teacher(runs)), *ONLY_TRANSLATION,
            "--tasks.translation.tokens", "2048", "--fine_tune.optimizer", "fresh", "--train.max_minutes", "0",
            "--train.max_steps", "2000", "--train.warmup_steps", "100", "--train.learning_rate", "1e-3",
            "--out", "{out}", "--overwrite",
        ],
    )  # fmt: skip


def students(
    runs: Runs,
    parent: Path,
    seed: int,
    steps: int,
    shape: Sequence[str],
    ways: Mapping[str, tuple[str, list[str], str]],
) -> list[Arm]:
    """A student for each way to distill, all of one shape and budget."""
    for name, (_, options, _) in ways.items():
        runs.make(
            f"{seed}/{name}",
            [
                *RECIPE, "distill", "--teacher", str(parent), *COMMON, *shape, *options, "--train.seed", str(seed),
                "--data.order_seed", str(seed), "--train.max_steps", str(steps),
                "--train.validate_every", str(steps // 8), "--out", "{out}", "--overwrite",
            ],
        )  # fmt: skip
    return [Arm(label, name, 0, note) for name, (label, _, note) in ways.items()]


def distilling(weight: float, inherit: str, *more: str) -> list[str]:
    """Options of `distill`."""
    return ["--distill.weight", str(weight), "--distill.inherit", inherit, *more]


def distillation(runs: Runs, seed: int, n: int, begin: Callable[[Runs], Path] = teacher) -> list[Arm]:
    """Into the dense model (Switch Transformer, section 4.1), with labels alone and the start alone as controls."""
    ways = {
        "labels": ("labels", distilling(0, "none"), "no teacher"),
        "plain": ("teacher", distilling(1, "none"), "the teacher's distribution alone"),
        "labels_init": (
            "labels, initialised",
            distilling(0, "non_moe"),
            "the teacher's non-expert weights, no teacher",
        ),
        "init": ("teacher, initialised", distilling(1, "non_moe"), "and the teacher's distribution alone"),
        "mixture": ("mixture, initialised", distilling(0.25, "non_moe"), "a quarter teacher, three quarters labels"),
    }
    parent = begin(Runs(runs.folder.parent))
    return students(runs, parent, seed, 2 * n, ["--model.num_experts", "0"], ways)


def early_distillation(runs: Runs, seed: int, n: int) -> list[Arm]:
    """`distillation` of the tiny run, which its students outgrow."""
    return distillation(runs, seed, n, early_teacher)


def mixture_of_students(runs: Runs, seed: int, n: int) -> list[Arm]:
    """Into half the depth, all sparse: DeepSpeed-MoE, section 4.2."""
    shape = [
        "--model.encoder_layers",
        "1",
        "--model.decoder_layers",
        "1",
        "--model.every",
        "1",
        "--distill.objective",
        "added",
    ]
    begin = "the teacher's sparse blocks"
    ways = {
        "none": ("labels", distilling(0, "everything"), f"{begin}, no teacher"),
        "full": ("full", distilling(1, "everything"), f"{begin}, the teacher to the end"),
        "staged": (
            "staged", distilling(1, "everything", "--distill.until", str(3 * n // 2)),
            f"{begin}, the teacher for half of the steps",
        ),
    }  # fmt: skip
    return students(runs, teacher(Runs(runs.folder.parent)), seed, 3 * n, shape, ways)


def curve(run: Path, before: int) -> list[tuple[int, float]]:
    """Validation loss of translation over all optimizer steps that were spent."""
    with (run / "metrics.csv").open() as file:
        rows = [(row["step"], row.get("valid/translation/loss")) for row in csv.DictReader(file)]
    return [(int(step) + 1 + before, float(loss)) for step, loss in rows if loss]


def measured(run: Path, before: int) -> dict[str, Any]:
    """A run's numbers."""
    summary = json.loads((run / "summary.json").read_text())
    points = curve(run, before)
    return {
        "parameters": summary["parameters"]["total"],
        "loss": points[-1][1],
        "bleu": summary["bleu"]["average"],
        "chrf": summary["chrf"]["average"],
        "curve": points,
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def table(arms: Sequence[Arm], results: Mapping[str, Sequence[Mapping[str, Any]]], against: str) -> str:
    """A row for each arm, with its paired difference to one of them.

    Where arms have parents, a column more compares them after equally many steps in a row, those of a second parent not
    counted: what somebody sees who has the parents anyway.
    """
    row = min(results[arm.folder][0]["curve"][-1][0] - arm.before for arm in arms)
    parents = any(arm.before for arm in arms)
    head = ["arm", "parameters", "steps in all", "validation nats", f"difference to “{against}”", "BLEU", "chrF"]
    head[3:3] = [f"nats after {row:,} in a row"] if parents else []
    lines = [f"| {' | '.join([*head, 'made of'])} |", f"|---|{'---:|' * (len(head) - 1)}---|"]
    base = next(arm.folder for arm in arms if arm.label == against)

    def cell(values: Sequence[float], digits: int, signed: bool = False) -> str:
        mean, half = interval(values)
        sign = "+" if signed else ""
        return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")

    for arm in arms:
        own = results[arm.folder]
        gap = [a["loss"] - b["loss"] for a, b in zip(own, results[base], strict=True)]
        cells = [arm.label, f"{own[0]['parameters']:,}", f"{own[0]['curve'][-1][0]:,}"]
        if parents:
            cells.append(cell([dict(r["curve"])[row + arm.before] for r in own], 3))
        cells += [cell([r["loss"] for r in own], 3), "" if arm.folder == base else cell(gap, 3, signed=True)]
        cells += [cell([r[key] for r in own], 1) for key in ("bleu", "chrf")]
        lines.append(f"| {' | '.join([*cells, arm.note])} |")
    seeds = len(results[base])
    note = f"{seeds} seeds, paired; mean ± half of the 95 % interval (t, {seeds - 1} degrees of freedom)."
    if parents:
        note += " Steps in all count those of every parent; steps in a row those of the longest line."
    return "\n".join([*lines, "", note, ""])


def mean_of(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean of several curves over the same steps."""
    return [(points[0][0], statistics.fmean(y for _, y in points)) for points in zip(*curves, strict=True)]


def draw(canvas: Canvas, colour: str, label: str, curves: Sequence[Sequence[tuple[int, float]]]) -> None:
    """A faint line for each seed and a firm one for their mean."""
    for curve in curves:
        canvas.axes.plot(*zip(*curve, strict=True), color=COLOURS[colour], alpha=0.25, linewidth=0.7)
    canvas.axes.plot(*zip(*mean_of(curves), strict=True), color=COLOURS[colour], label=label)


def drawing(arms: Sequence[Arm], results: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> bytes:
    """Validation loss over the steps spent."""
    with Canvas(3.0) as canvas:
        last = []
        for colour, arm in zip((*CYCLE, "muted"), arms, strict=False):
            curves = [result["curve"] for result in results[arm.folder]]
            draw(canvas, colour, arm.label, curves)
            last.append(mean_of(curves)[-1][1])
        canvas.axes.set_xlabel("optimizer steps in all, parents included")
        canvas.axes.set_ylabel("validation loss, nats")
        canvas.axes.set_ylim(min(last) - 0.1, max(last) + 1.0)
        canvas.legend()
        return saved(canvas, title)


def differences(arms: Sequence[Arm], results: Mapping[str, Sequence[Mapping[str, Any]]], against: str) -> bytes:
    """Paired differences to one arm over the steps, for the arms that end within half a nat of it."""
    base = next(arm.folder for arm in arms if arm.label == against)
    with Canvas(3.0) as canvas:
        for colour, arm in zip(CYCLE, [arm for arm in arms if arm.folder != base], strict=False):
            gaps = [
                [(step, y - dict(b["curve"])[step]) for step, y in a["curve"]]
                for a, b in zip(results[arm.folder], results[base], strict=True)
            ]
            if abs(mean_of(gaps)[-1][1]) <= 0.5:
                draw(canvas, colour, arm.label, gaps)
        canvas.axes.axhline(0.0, color=COLOURS["muted"], linewidth=0.8)
        canvas.axes.set_xlabel("optimizer steps")
        canvas.axes.set_ylabel(f"nats more than “{against}”")
        canvas.legend()
        return saved(canvas, against)


def saved(canvas: Canvas, title: str) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    canvas.figure.savefig(file, format="svg", metadata={"Date": None, "Title": title}, facecolor=COLOURS["paper"])
    return file.getvalue()


EXPERIMENTS: Mapping[str, tuple[Callable[[Runs, int, int], list[Arm]], str]] = {
    "aggregation": (aggregation, "8 from scratch"),
    "distillation": (distillation, "labels, initialised"),
    "early": (early_distillation, "labels, initialised"),
    "students": (mixture_of_students, "labels"),
}


def collected(name: str, runs: Runs, seeds: int, n: int) -> Iterator[tuple[str, bytes]]:
    """Run an experiment; yield file names and what is in them."""
    experiment, against = EXPERIMENTS[name]
    results: dict[str, list[dict[str, Any]]] = {}
    arms: list[Arm] = []
    for seed in range(1, seeds + 1):
        arms = experiment(runs, seed, n)
        for arm in arms:
            results.setdefault(arm.folder, []).append(measured(runs.path(f"{seed}/{arm.folder}"), arm.before))
    yield f"{name}.json", json.dumps({arm.label: results[arm.folder] for arm in arms}, indent=1).encode()
    yield f"{name}.md", table(arms, results, against).encode()
    alike = not any(arm.before for arm in arms)
    yield f"{name}.svg", differences(arms, results, against) if alike else drawing(arms, results, name)


def main() -> None:
    """Parse the command line and run one experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "pruning"])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (default: 5)")
    parser.add_argument("--steps", type=int, default=600, help="of a parent; every arm follows it (default: 600)")
    parser.add_argument("--recover", type=int, default=100, help="steps of training after pruning (default: 100)")
    parser.add_argument("--runs", type=Path, default=Path("runs/surgery"))
    parser.add_argument("--out", type=Path, default=Path("recipes/zcode_m3/results/surgery"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.experiment == "pruning":
        run = early_teacher(Runs(given.runs))
        command = [*SURGERY, "curve", str(run), "--recover", str(given.recover), "--out", str(given.out)]
        subprocess.run(command, check=True)
        return
    for file, content in collected(given.experiment, Runs(given.runs / given.experiment), given.seeds, given.steps):
        (given.out / file).write_bytes(content)
        print("wrote", given.out / file)


if __name__ == "__main__":
    main()
