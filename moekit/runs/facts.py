"""Runs on text of which more is known: what they are asked, and what the best of models would lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from moekit.data.batch import SPECIALS
from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.inference.choices import ChoiceScorer, recall
from moekit.runs.agreement import agreement_questions, held_out_text, scores_sentences
from moekit.runs.config import RunConfig
from moekit.runs.record import FloorRecord, RecallOf, RecallRecord
from moekit.runs.words import word_questions
from moekit.source import ChoiceQuestion, Source, Split
from moekit.tasks import TASKS
from moekit.training.multitask import MultitaskModule


def require_questions(config: RunConfig, data: MultitaskData) -> None:
    """Make sure that what a run's test is to ask of its text can be asked.

    Raises:
        UserError: as `word_questions` and `agreement_questions`; or the text is mixed with others in its languages.
    """
    if config.evaluate.words:
        word_questions(config, data)
    if config.evaluate.agreement and not agreement_questions(config, data):
        raise UserError(
            "evaluate.agreement asks for agreement in generated text, whose languages must have no other: got "
            f"{', '.join(config.data.sources)}. Choose one of these, or set evaluate.agreement to 0."
        )


def ask(module: MultitaskModule, config: RunConfig, data: MultitaskData, source: Source | None) -> None:
    """Have the test of `module` ask what is known of its text: facts, words, agreement; of other text, nothing.

    Args:
        module: what is tested.
        config: settings of the run.
        data: its held-out text.
        source: what knows the facts of the text, if anything does.

    Raises:
        UserError: more choices than a relation has values or a kind has nouns; or as `require_questions`.
    """
    asked: dict[str, list[ChoiceQuestion]] = {
        "facts": [] if source is None else _fact_questions(module, config, data, source),
        "words": word_questions(config, data) if config.evaluate.words else [],
        "agreement": agreement_questions(config, data) if config.evaluate.agreement else [],
    }
    if any(asked.values()):
        scorer = ChoiceScorer(
            module.backbone,
            module.heads,
            data.tokenizer,
            batch_tokens=config.evaluate.batch_tokens,
            readers=data.readers,
            sentinel=config.data.sentinel,
        )
        module.ask = partial(_ask, scorer, asked)


def _fact_questions(
    module: MultitaskModule, config: RunConfig, data: MultitaskData, source: Source
) -> list[ChoiceQuestion]:
    wanted = config.evaluate.facts
    if not wanted or not any(scores_sentences(task) for task in module.heads):
        return []
    return [
        question
        for language in data.languages
        if held_out_text(data, source, language, "valid")
        for question in source.questions(language, each=wanted, choices=config.evaluate.choices)
    ]


def _ask(scorer: ChoiceScorer, asked: Mapping[str, Sequence[ChoiceQuestion]], task: str) -> list[RecallRecord]:
    """What a task answers: for words where it translates, else for facts and agreement, where it scores sentences."""
    found = []
    for about, questions in asked.items():
        answers = TASKS[task].recalls == "target" if about == "words" else scores_sentences(task)
        if not questions or not answers:
            continue
        choices = len(questions[0].sentences)
        kinds = [RecallOf.from_json(kind) for kind in recall(questions, scorer.score(task, questions))]
        found.append(RecallRecord(task=task, choices=choices, chance=1 / choices, kinds=kinds, about=about))
    return found


def floors(data: MultitaskData, source: Source) -> list[FloorRecord]:
    """What the best of models would lose on the held-out text of `data`, of tasks that score whole sentences.

    None of a split whose sentences are not all the source's, or are cut: nobody knows their probability.
    """
    found = []
    splits: tuple[Split, ...] = ("valid", "test")
    for task in (name for name in data.tasks if TASKS[name].recalls == "sentence"):
        for split in splits:
            if task in data.evaluated(split) and (known := floor(data, source, split)) is not None:
                found.append(FloorRecord(task=task, split=split, knowing=known[0], guessing=known[1]))
    return found


def floor(data: MultitaskData, source: Source, split: Split) -> tuple[float, float] | None:
    """Loss of a model that knows all that `source` tells, and of one that knows no fact, on a split of `data`.

    Nats per prediction of a language model; None where the sentences are not all the source's, or are cut.
    """
    knowing = guessing = 0.0
    predictions = 0
    for language in data.languages:
        texts = held_out_text(data, source, language, split)
        known = source.information(language, split) if texts else None
        lengths = [len(ids) for ids in data.tokenizer.encode_batch(texts)]
        if known is None or max(lengths) > data.max_length - SPECIALS:
            return None
        predictions += sum(lengths) + len(lengths)  # the end of each sentence too
        knowing += sum(known.knowing[: len(texts)])
        guessing += sum(known.guessing[: len(texts)])
    return (knowing / predictions, guessing / predictions) if predictions else None
