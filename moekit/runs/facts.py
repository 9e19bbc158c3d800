"""Runs on text of which more is known: what they are asked, and what the best of models would lose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from moekit.data.batch import SPECIALS
from moekit.data.module import MultitaskData
from moekit.inference.facts import FactScorer, recall
from moekit.runs.config import RunConfig
from moekit.runs.record import FloorRecord, RecallOf, RecallRecord
from moekit.runs.words import word_questions
from moekit.source import FactQuestion, Source, Split
from moekit.tasks import TASKS
from moekit.training.multitask import MultitaskModule


def ask(module: MultitaskModule, config: RunConfig, data: MultitaskData, source: Source | None) -> None:
    """Have the test of `module` ask for the facts and words of its text; of a text that is not the source's, nothing.

    Args:
        module: what is tested.
        config: settings of the run.
        data: its held-out text.
        source: what knows the facts of the text, if anything does.

    Raises:
        UserError: more choices than a relation has values or a kind has nouns; or as `word_questions`.
    """
    facts = [] if source is None else _fact_questions(module, config, data, source)
    words = word_questions(config, data) if config.evaluate.words else []
    if facts or words:
        scorer = FactScorer(
            module.backbone,
            module.heads,
            data.tokenizer,
            batch_tokens=config.evaluate.batch_tokens,
            readers=data.readers,
            sentinel=config.data.sentinel,
        )
        module.ask = partial(_ask, scorer, facts, words)


def _fact_questions(
    module: MultitaskModule, config: RunConfig, data: MultitaskData, source: Source
) -> list[FactQuestion]:
    wanted = config.evaluate.facts
    if not wanted or not any(TASKS[task].recalls not in (None, "target") for task in module.heads):
        return []
    return [
        question
        for language in data.languages
        if _texts(data, source, language, "valid")
        for question in source.questions(language, each=wanted, choices=config.evaluate.choices)
    ]


def _ask(
    scorer: FactScorer, facts: Sequence[FactQuestion], words: Sequence[FactQuestion], task: str
) -> RecallRecord | None:
    way = TASKS[task].recalls
    questions = words if way == "target" else facts
    if way is None or not questions:
        return None
    choices = len(questions[0].sentences)
    kinds = [RecallOf.from_json(kind) for kind in recall(questions, scorer.score(task, questions))]
    about = "words" if way == "target" else "facts"
    return RecallRecord(task=task, choices=choices, chance=1 / choices, kinds=kinds, about=about)


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
        texts = _texts(data, source, language, split)
        known = source.information(language, split) if texts else None
        lengths = [len(ids) for ids in data.tokenizer.encode_batch(texts)]
        if known is None or max(lengths) > data.max_length - SPECIALS:
            return None
        predictions += sum(lengths) + len(lengths)  # the end of each sentence too
        knowing += sum(known.knowing[: len(texts)])
        guessing += sum(known.guessing[: len(texts)])
    return (knowing / predictions, guessing / predictions) if predictions else None


def _texts(data: MultitaskData, source: Source, language: str, split: Split) -> list[str]:
    """The held-out sentences of a language in `data`; none where they are not those of `source`."""
    if language not in source.languages or not source.knows_facts:
        return []
    texts = list(
        data.source.monolingual(language, split)[: data.valid_sentences if split == "valid" else data.test_sentences]
    )
    return texts if texts == list(source.monolingual(language, split)[: len(texts)]) else []
