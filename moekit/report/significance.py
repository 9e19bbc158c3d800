"""Whether two runs translate differently well, or were lucky: paired bootstrap of BLEU on the same test sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from moekit.errors import UserError
from moekit.report.run_folder import RunFolder
from moekit.report.view import Table
from moekit.report.wording import fixed
from moekit.runs.record import TRANSLATIONS, Written, read_written
from moekit.tasks.bleu import bleu

ALL = "all sentences"
DRAWS = 1000
MAX_SENTENCES = 20_000
"""Of a test; it holds a thousand draws of them in memory."""


@dataclass(frozen=True)
class Paired:
    """BLEU of two runs on the same sentences, with the half width of its 95 % interval, and the p-value."""

    scores: tuple[float, float]
    means: tuple[float, float]
    intervals: tuple[float, float]
    p: float


def paired_bootstrap(
    references: Sequence[str], first: Sequence[str], other: Sequence[str], tokenize: str = "13a"
) -> Paired:
    """Sacrebleu's paired bootstrap test of BLEU, with its fixed seed.

    Runs of the same score have p = 1, where sacrebleu has the least there is: of no difference all is luck.

    Args:
        references: a sentence each.
        first: what the baseline wrote.
        other: what the other run wrote.
        tokenize: sacrebleu's tokenizer.

    Raises:
        UserError: the tokenizer is not installed.

    Source: W04-3250, as in sacrebleu.
    """
    from sacrebleu.metrics.bleu import BLEU  # where it is used: few pages compare translations
    from sacrebleu.significance import PairedTest

    bleu(tokenize)  # says what is wrong where it cannot be had

    systems: list[tuple[str, Sequence[str]]] = [("first", list(first)), ("other", list(other))]
    metrics = {"BLEU": BLEU(tokenize=tokenize, force=True)}
    _, found = PairedTest(systems, metrics, [list(references)], test_type="bs", n_samples=DRAWS)()
    a, b = (cast(Any, result) for result in found["BLEU"])
    return Paired((a.score, b.score), (a.mean, b.mean), (a.ci, b.ci), 1.0 if a.score == b.score else b.p_value)


def significance(runs: Sequence[RunFolder], names: Sequence[str]) -> tuple[list[Table], list[str]]:
    """A table for each run but the first, by direction; and why there is none, by the run's name."""
    tables, notes = [], []
    for run, name in zip(runs[1:], names[1:], strict=True):
        try:
            rows = [*_rows(runs[0], run)]
        except UserError as error:
            notes.append(f"No paired test of {names[0]} and {name}: {error}")
            continue
        headers = ["direction", names[0], name, "p"]
        tables.append(Table(headers, rows, f"BLEU, paired bootstrap: {name}"))
    return tables, notes


def _rows(first: RunFolder, other: RunFolder) -> Iterator[tuple[str, ...]]:
    """A row for all sentences together, and one for each direction that both runs were tested in."""
    written = [_written(run) for run in (first, other)]
    signatures = [run.scores("bleu").signature for run in (first, other)]
    if signatures[0] != signatures[1]:
        raise UserError(f"the signatures of BLEU differ: {signatures[0] or 'none'} and {signatures[1] or 'none'}.")
    shared = [direction for direction in written[0] if direction in written[1]]
    if not shared:
        raise UserError("they were tested in different directions.")
    for direction in shared:
        if [row[:2] for row in written[0][direction]] != [row[:2] for row in written[1][direction]]:
            raise UserError(f"the test sentences of {direction} differ.")
    tokenizers = {direction: _tokenizer(signatures[0], direction) for direction in shared}
    # Text that is split in two ways has no BLEU of all of it.
    parts = {ALL: shared} if len(shared) > 1 and len({*tokenizers.values()}) == 1 else {}
    for name, directions in (parts | {direction: [direction] for direction in shared}).items():
        rows = [[row for direction in directions for row in one[direction]] for one in written]
        if len(rows[0]) > MAX_SENTENCES:
            yield name, *["more than " + f"{MAX_SENTENCES:,} sentences"] * 2, fixed(None)
            continue
        references, hypotheses = [row[1] for row in rows[0]], [[row[2] for row in one] for one in rows]
        found = paired_bootstrap(references, hypotheses[0], hypotheses[1], tokenizers[directions[0]])
        told = [f"{fixed(s)} ± {fixed(w)}" for s, w in zip(found.scores, found.intervals, strict=True)]
        yield name, *told, f"{found.p:.3f}"


def _tokenizer(signature: str, direction: str) -> str:
    """Sacrebleu's tokenizer of a direction, of a signature that names the languages of all but the first.

    Raises:
        UserError: there is none of that name.
    """
    from sacrebleu.metrics.bleu import BLEU  # where it is used: few pages compare translations

    language = direction.rpartition("-")[2]
    said = ""
    for number, part in enumerate(signature.split("; ")):
        into = re.search(r"\(into ([^)]*)\)", part)
        if number == 0 or (into and language in into[1].split(", ")):
            said = match[1] if (match := re.search(r"tok:([^|\s]+)", part)) else "13a"
    # Behind the name stand versions, as in ja-mecab-0.996-IPA.
    names = [name for name in BLEU.TOKENIZERS if said == name or said.startswith(f"{name}-")]
    if not names:
        raise UserError(f"sacrebleu here has no tokenizer {said}, by which the run was scored.")
    return str(max(names, key=len))


def _written(run: RunFolder) -> Mapping[str, Sequence[Written]]:
    if (found := read_written(run.path / TRANSLATIONS).get("translation")) is None:
        raise UserError(f"{run.path} has no {TRANSLATIONS}, which the command test writes.")
    return found
