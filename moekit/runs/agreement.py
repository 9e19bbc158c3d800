"""Runs on text of generated languages: whether they know which form of a word agrees."""

from __future__ import annotations

from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.source import ChoiceQuestion, Source, Split
from moekit.tasks import TASKS


def agreement_questions(config: RunConfig, data: MultitaskData) -> list[ChoiceQuestion]:
    """Questions about agreement in all languages, `evaluate.agreement` of each kind; of text of another origin, none.

    Args:
        config: settings of the run.
        data: its text, of which the validation is looked at: it must be what the source makes.

    Raises:
        UserError: agreement is asked for, and the run has no task or no text that it can be asked of, or the text has
            no agreement.
    """
    source = config.data.grammar()
    if source is None or not any(scores_sentences(task) for task in data.tasks):
        raise UserError(
            "evaluate.agreement asks for agreement in generated languages, so data.source must be babel or facts and a "
            f"task must score sentences of one language, as causal_lm does: got {', '.join(config.data.sources)} and "
            f"{', '.join(data.tasks)}. Set evaluate.agreement to 0."
        )
    own = [code for code in data.languages if code in source.languages]
    found = {code: source.agreement_questions(code, each=config.evaluate.agreement) for code in own}
    if not any(found.values()):
        raise UserError(
            f"evaluate.agreement asks for agreement, and the text must have some: got {source.name} in "
            f"{', '.join(data.languages)}, where no verb, adjective or article has forms to choose from. Set "
            "evaluate.agreement to 0, or choose other languages by data.babel_languages or data.directions."
        )
    return [question for code in own if held_out_text(data, source, code, "valid") for question in found[code]]


def scores_sentences(task: str) -> bool:
    """Whether a task says how likely a sentence of one language is, or what of it is missing."""
    return TASKS[task].recalls not in (None, "target")


def held_out_text(data: MultitaskData, source: Source, language: str, split: Split) -> list[str]:
    """The held-out sentences of a language in `data`; none where they are not those of `source`."""
    if language not in source.languages:
        return []
    number = data.valid_sentences if split == "valid" else data.test_sentences
    texts = list(data.source.monolingual(language, split)[:number])
    return texts if texts == list(source.monolingual(language, split)[: len(texts)]) else []
