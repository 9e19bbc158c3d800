"""The commands of a recipe that use a trained run: test, generate and score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from moekit.cli.command import RecipeCommand, option_value, say
from moekit.cli.training import FOLDER, folder, test_and_report
from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.runs.fit import is_first_process
from moekit.runs.generate import generate
from moekit.runs.recipe import Recipe
from moekit.runs.run import CHECKPOINTS, Run
from moekit.runs.score import score
from moekit.runs.text import corpus_note


def _stored_run(recipe: Recipe, given: Any) -> Run:
    return _own(recipe, Run.open(folder(recipe, given.variant, given.out), given.checkpoint))


def _own(recipe: Recipe, run: Run) -> Run:
    if (name := run.settings.get("recipe")) != recipe.name:
        raise UserError(f"{run.path} must hold a run of {recipe.name}: it is of {name}.")
    return run


def _stored_settings(recipe: Recipe, arguments: Sequence[str], variant: str | None) -> tuple[str, RunConfig] | None:
    """Variant and settings of the run that a command uses, on one device of this machine; None where there is none."""
    run = Run(folder(recipe, variant or next(iter(recipe.variants)), option_value(arguments, "--out")))
    if not run.in_folder:
        return None
    config = _own(recipe, run).config
    return variant or run.variant, config.changed(train=config.train.elsewhere())


def _folder_option(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, help=FOLDER)
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        help="which weights are used (default: the average of the last ones if there is one, else the best, else the "
        "last)",
    )


def _text_options(parser: ArgumentParser, source: str, target: str, input: str) -> None:
    _folder_option(parser)
    parser.add_argument("--from", type=str, dest="source_language", help=f"language code of {source}")
    parser.add_argument("--to", type=str, dest="target_language", help=target)
    parser.add_argument("--input", type=str, default="-", help=input)


def _text(given: Any) -> dict[str, Any]:
    """What `generate` and `score` take alike."""
    return {
        "source": given.source_language,
        "target": given.target_language,
        "input": given.input,
        "output": given.output,
    }


def _test(recipe: Recipe, config: RunConfig, given: Any) -> None:
    run = _stored_run(recipe, given)
    if is_first_process() and (note := corpus_note(run)):
        say(Console(), f"{run.path}: {note}")
    test_and_report(run, config)


def _generate_options(parser: ArgumentParser) -> None:
    _text_options(
        parser,
        "the input",
        "target language code; only for translation",
        "input file, with one sentence or prompt per line; - = standard input",
    )
    parser.add_argument("--output", type=str, default="-", help="output file, one line each; - = standard output")
    parser.add_argument(
        "--experts_in_memory",
        type=int,
        default=0,
        help="maximum number of experts per layer kept in memory; others are mapped from disk when tokens need them. "
        "0 = keep all",
    )


def _generate(recipe: Recipe, config: RunConfig, given: Any) -> None:
    run = _stored_run(recipe, given)
    generate(run, config=config, experts_in_memory=given.experts_in_memory, **_text(given))


def _score_options(parser: ArgumentParser) -> None:
    _text_options(
        parser,
        "contexts",
        "language code of continuations (default: --from)",
        'file of JSON lines {"context": text, "continuations": [text, ...], "answer": index from 0 (optional)}; '
        "- = standard input",
    )
    parser.add_argument("--examples", type=str, help="JSON lines with answers, put before every context (few-shot)")
    parser.add_argument("--output", type=str, default="-", help="output file of JSON lines; - = standard output")


def _score(recipe: Recipe, config: RunConfig, given: Any) -> None:
    score(_stored_run(recipe, given), config=config, examples=given.examples, **_text(given))


_SEARCH = ("evaluate.beam_size", "evaluate.length_penalty", "evaluate.batch_tokens")

TEST = RecipeCommand(
    "Test a trained run and rewrite its report", _folder_option, _test,
    ("train.devices", "train.num_nodes", "train.accelerator", *_SEARCH, "evaluate.samples", "evaluate.bleu_tokenizer"),
    _stored_settings,
)  # fmt: skip
GENERATE = RecipeCommand(
    "Translate or continue text with a trained run", _generate_options, _generate, ("train.accelerator", *_SEARCH),
    _stored_settings,
)  # fmt: skip
SCORE = RecipeCommand(
    "Answer multiple-choice questions by the most likely continuation", _score_options, _score,
    ("evaluate.batch_tokens",), _stored_settings,
)  # fmt: skip
