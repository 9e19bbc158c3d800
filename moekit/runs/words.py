"""Runs that translate text whose meanings are known: which words they are asked for."""

from __future__ import annotations

from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.source import ChoiceQuestion, Direction, Source
from moekit.tasks import TASKS


def word_questions(config: RunConfig, data: MultitaskData) -> list[ChoiceQuestion]:
    """Questions about the words of all directions, `evaluate.words` of each decile; of other text, none.

    Args:
        config: settings of the run.
        data: its text, of which the validation is looked at: it must be what the source makes.

    Raises:
        UserError: words are asked for, and the run translates no text whose meanings are known, or there are more
            choices than nouns of a kind.
    """
    source = config.data.dictionary()
    if source is None or not any(TASKS[task].recalls == "target" for task in data.tasks):
        raise UserError(
            "evaluate.words asks for words of generated languages, so data.source must be babel and a task must be "
            f"translation: got {', '.join(config.data.sources)} and {', '.join(data.tasks)}. Set evaluate.words to 0."
        )
    return [
        question
        for direction in data.directions
        if _is_of(data, source, direction)
        for question in source.word_questions(direction, each=config.evaluate.words, choices=config.evaluate.choices)
    ]


def _is_of(data: MultitaskData, source: Source, direction: Direction) -> bool:
    """Whether the validation pairs of a direction are those of the source."""
    if direction not in source.directions:
        return False
    pairs = list(data.source.parallel(direction, "valid")[: data.valid_sentences])
    return bool(pairs) and pairs == list(source.parallel(direction, "valid")[: len(pairs)])
