"""Answering multiple-choice questions with a trained run: the likeliest continuation, zero-shot or after examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from moekit.atomic import require_writable
from moekit.data.lines import STANDARD, read_lines, require_plain, write_lines
from moekit.data.sources.files import read_json
from moekit.errors import UserError
from moekit.inference.scoring import Normalise, Question, Scorer, accuracy, few_shot
from moekit.runs.config import RunConfig
from moekit.runs.run import Run
from moekit.runs.writer import trained

_WAYS: tuple[Normalise, ...] = ("sum", "token", "character")


def score(
    run: Run,
    source: str | None,
    target: str | None = None,
    *,
    config: RunConfig | None = None,
    input: str = "-",
    examples: str | None = None,
    output: str = "-",
) -> None:
    """Score the continuations of every question, and say how often the likeliest is the answer.

    Args:
        run: the run.
        source: language of the contexts; None = the only one that the run knows.
        target: language of the continuations; None = `source`.
        config: its settings, where they are not the run's: other sizes of a batch, for example.
        input: JSON lines; - = standard input.
        examples: JSON lines with answers, shown before every context.
        output: file for JSON lines of scores; - = standard output.

    Raises:
        UserError: if a language is missing or unknown, a line is no question, or the run has no decoder.
    """
    if output != STANDARD:
        require_writable(Path(output))
    backbone, data = trained(run)
    if not hasattr(backbone, "decode"):
        raise UserError(f"score needs a run with a decoder: {run.path} has a {type(backbone).__name__}.")
    if source is None and len(data.tokenizer.languages) == 1:
        source = data.tokenizer.languages[0]
    if source is None:
        raise UserError(f"score needs --from: one of {', '.join(data.tokenizer.languages)}.")
    shown = [] if examples is None else _questions(examples, "--examples", answered=True)
    asked = _questions(input, "--input")
    questions = [few_shot(question, shown) for question in asked]
    config = config or run.config
    scorer = Scorer(backbone, data.tokenizer, batch_tokens=config.evaluate.batch_tokens, sentinel=config.data.sentinel)
    try:
        scores = scorer.score(questions, source, target)
    except ValueError as error:
        raise UserError(f"--input {input}: {error}") from None
    lines = [
        json.dumps(
            {"best": {by: s.best(by) for by in _WAYS}, "scores": {by: s.normalised(by) for by in _WAYS}},
            ensure_ascii=False,
        )
        for s in scores
    ]
    write_lines(output, lines)
    known = sum(question.answer is not None for question in questions)
    if known:
        shares = ", ".join(f"{accuracy(questions, scores, by):.4f} by {by}" for by in _WAYS)
        print(f"accuracy of {known} answers, {len(shown)} examples shown: {shares}", file=sys.stderr)


def _questions(name: str, option: str, *, answered: bool = False) -> list[Question]:
    return list(_parsed(read_lines(name, option), f"{option} {name}", answered=answered))


def _parsed(lines: Iterable[str], where: str, *, answered: bool) -> Iterable[Question]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        entry = read_json(line, place)
        texts = entry.get("continuations") if isinstance(entry, dict) else None
        answer = entry.get("answer") if isinstance(entry, dict) else None
        if (
            not isinstance(texts, list)
            or not all(isinstance(text, str) for text in texts)
            or not isinstance(entry.get("context"), str)
            or not (type(answer) is int or (answer is None and not answered))
        ):
            raise UserError(
                f'{place} must be {{"context": text, "continuations": [text, ...], "answer": number}}'
                f"{'' if answered else ', the answer may be left out'}: got {line.strip()[:80]}"
            )
        for text in (entry["context"], *texts):
            require_plain(text, place)
        try:
            yield Question(entry["context"], tuple(texts), answer)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
