"""Balanced assignment: moekit's solvers beside scipy's `linear_sum_assignment` on the expanded problem.

scipy gets what it needs: experts expanded into T / E slots each, a T x T matrix. All solvers get the same scores, take
turns in one process, and must reach the same value, or nothing is reported. Times are of the processor, so that other
programs count less; the figure is the median over rounds of the ratio of neighbouring runs. "random" scores are normal;
"zipf" ones come from clusters of very uneven size, so that most tokens want the same few experts.

    python benchmarks/assignment.py                             # 4096 x 32: scipy, torch, numba
    python benchmarks/assignment.py --sizes 16384x128           # too large for scipy
    python benchmarks/assignment.py --sizes 4096x32 16384x128 --out benchmarks/assignment_cpu_202611.md

scipy is needed for the ratio only: pip install -e ".[test]"; numba: pip install -e ".[fast]".
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from interleaved import counted, written
from torch import Tensor

from moekit.functional import balanced_assignment as in_torch
from moekit.kernels import balanced_assignment as compiled
from moekit.kernels.balanced_assignment import has_numba

Solver = Callable[[Tensor], Tensor]


def random_scores(tokens: int, experts: int) -> Tensor:
    """Independent normal scores."""
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))


def zipf_scores(tokens: int, experts: int, dim: int = 32) -> Tensor:
    """Tokens near centroids, the n-th of which is chosen with probability proportional to 1 / n."""
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(experts, dim, generator=generator)
    cluster = torch.multinomial(1 / torch.arange(1.0, experts + 1), tokens, replacement=True, generator=generator)
    return (centroids[cluster] + 0.7 * torch.randn(tokens, dim, generator=generator)) @ centroids.t()


def expanded(scores: Tensor) -> Tensor:
    """The solver of scipy, one column per slot."""
    from scipy.optimize import linear_sum_assignment

    tokens, experts = scores.shape
    slots = tokens // experts
    rows, columns = linear_sum_assignment(scores.double().repeat_interleave(slots, dim=1).numpy(), maximize=True)
    assert (rows == range(tokens)).all()
    return torch.from_numpy(columns // slots)


def value(scores: Tensor, expert: Tensor) -> float:
    """The sum of scores, if loads are balanced."""
    tokens, experts = scores.shape
    if torch.bincount(expert, minlength=experts).tolist() != [tokens // experts] * experts:
        raise SystemExit("refusing to report: loads are not balanced")
    return float(scores.double().gather(1, expert[:, None]).sum())


def measure(scores: Tensor, solvers: dict[str, Solver], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each solver in turn, after a run of each that is not counted but whose values must agree."""
    values = {name: value(scores, solve(scores)) for name, solve in solvers.items()}
    best = max(values.values())
    if any(abs(v - best) > 1e-9 * abs(best) for v in values.values()):
        raise SystemExit(f"refusing to report: the solvers reach different values {values}")
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    for _ in range(rounds):
        for name, solve in solvers.items():
            start = time.process_time()
            solve(scores)
            seconds[name].append(time.process_time() - start)
    return seconds


def milliseconds(values: list[float]) -> str:
    """Median and range."""
    low, middle, high = (1e3 * v for v in (min(values), statistics.median(values), max(values)))
    shown = [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (middle, low, high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def report(rows: list[list[str]], command: str, threads: int) -> str:
    """The result as Markdown."""
    heads = ["tokens x experts", "scores", "solver", "ms, median (range)", "times faster than scipy"]
    table = [heads, ["---"] * len(heads), *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join(
        [
            "# Balanced assignment beside scipy, CPU",
            "",
            f"`{command}`, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
            f"{threads} thread{'s' if threads > 1 else ''}.",
            "All solvers reach the same value; runs alternate in one process, the ratio is the median over rounds.",
            "Times are of the processor, not of the clock on the wall.",
            "Compiling (numba, once, then kept on disk) is not counted.",
            "",
            *lines,
            "",
        ]
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4096x32"], help="tokens x experts (default 4096x32)")
    parser.add_argument("--scipy-up-to", type=int, default=8192, help="tokens; beyond, scipy takes minutes")
    parser.add_argument("--rounds", type=counted, default=3, help="counted rounds (default 3)")
    parser.add_argument("--threads", type=counted, default=1)
    parser.add_argument("--out", type=written, help="also write the table as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    ours: dict[str, Solver] = {"moekit, torch alone": in_torch}
    if has_numba():
        ours["moekit, numba"] = compiled
    rows = []
    for size in options.sizes:
        tokens, experts = (int(n) for n in size.split("x"))
        if tokens % experts:
            parser.error(f"--sizes must have experts that divide tokens, for scipy's slots: got {size}.")
        peers: dict[str, Solver] = {"scipy": expanded} if tokens <= options.scipy_up_to else {}
        for name, make in (("random", random_scores), ("zipf", zipf_scores)):
            seconds = measure(make(tokens, experts), peers | ours, options.rounds)
            for solver, values in seconds.items():
                ratio = "-"
                if peers and solver != "scipy":
                    ratio = f"{statistics.median(p / v for p, v in zip(seconds['scipy'], values, strict=True)):,.0f}"
                rows.append([f"{tokens} x {experts}", name, solver, milliseconds(values), ratio])
    text = report(rows, " ".join(["python", "benchmarks/assignment.py", *sys.argv[1:]]), options.threads)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
