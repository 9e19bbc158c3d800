"""Answering multiple-choice questions with a trained run: the likeliest continuation, zero-shot or after examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from moekit.atomic import write_text
from moekit.errors import UserError
from moekit.inference.scoring import Normalise, Question, Scorer, accuracy, few_shot
from moekit.recipes._generation import reading, trained
from moekit.recipes._parts import Build
from moekit.training.run_folder import RunFolder

_WAYS: tuple[Normalise, ...] = ("sum", "token", "character")


def options(parser: ArgumentParser) -> None:
    """Options of ``score`` beside the run's folder."""
    parser.add_argument("--from", type=str, default=None, dest="source_language", help="language of the contexts")
    parser.add_argument(
        "--to", type=str, default=None, dest="target_language", help="language of the continuations (default: --from)"
    )
    parser.add_argument(
        "--input",
        type=str,
        default="-",
        help='JSON lines {"context": text, "continuations": [text, ...], "answer": number from 0, or left out}; '
        "- = standard input",
    )
    parser.add_argument(
        "--examples", type=str, default=None, help="JSON lines with answers, shown before every context: few-shot"
    )
    parser.add_argument("--output", type=str, default="-", help="file for JSON lines of scores; - = standard output")


def score(build: Build, config: Any, folder: RunFolder, given: Namespace) -> None:
    """Score the continuations of every question, and say how often the likeliest is the answer.

    Raises:
        UserError: if a language is missing or unknown, a line is no question, or the run has no decoder.
    """
    backbone, data = trained(build, config, folder, 0)
    if not hasattr(backbone, "decode"):
        raise UserError(f"score needs a run with a decoder: {folder.path} has a {type(backbone).__name__}.")
    if given.source_language is None:
        raise UserError(f"score needs --from: one of {', '.join(data.tokenizer.languages)}.")
    examples = [] if given.examples is None else _questions(given.examples, "--examples", answered=True)
    asked = _questions(given.input, "--input")
    questions = [few_shot(question, examples) for question in asked]
    scorer = Scorer(backbone, data.tokenizer, batch_tokens=config.evaluate.batch_tokens, sentinel=config.data.sentinel)
    try:
        scores = scorer.score(questions, given.source_language, given.target_language)
    except ValueError as error:
        raise UserError(f"--input {given.input}: {error}") from None
    lines = [
        json.dumps(
            {"best": {by: s.best(by) for by in _WAYS}, "scores": {by: s.normalised(by) for by in _WAYS}},
            ensure_ascii=False,
        )
        for s in scores
    ]
    text = "".join(line + "\n" for line in lines)
    if given.output == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(given.output), text)
    known = sum(question.answer is not None for question in questions)
    if known:
        shares = ", ".join(f"{accuracy(questions, scores, by):.4f} by {by}" for by in _WAYS)
        print(f"accuracy of {known} answers, {len(examples)} examples shown: {shares}", file=sys.stderr)


def _questions(name: str, option: str, *, answered: bool = False) -> list[Question]:
    with reading(name, option) as file:
        return list(_parsed(file, f"{option} {name}", answered=answered))


def _parsed(lines: Iterable[str], where: str, *, answered: bool) -> Iterable[Question]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place} must be JSON: {error}.") from None
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
        try:
            yield Question(entry["context"], tuple(texts), answer)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
