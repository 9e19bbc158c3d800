"""Questions of multiple choice that a source can ask a model: about its facts, its words and its grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

QuestionKind = Literal[
    "known", "composed", "unknowable", "verb", "verb_attractor", "adjective", "article", "undetermined"
]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
DECILES = 10


@dataclass(frozen=True)
class ChoiceQuestion:
    """Several sentences of which one is right: multiple choice.

    About a fact: a sentence with several values. About the word for a noun: then a sentence is given, and the others
    are translations of it in which that noun, or another one, stands. Or about agreement: a sentence, and the same with
    a word in another form.

    Attributes:
        kind: "known" = a fact that training told in other forms, or a noun that stood in other sentences; "composed" =
            two facts that it told, put together as it did not; "unknowable" = of an entity of whom it told nothing, or
            a noun that it never had. Of agreement "verb", "adjective" and "article", by the word that has to agree;
            "verb_attractor" = a verb in the form that another noun, between it and its subject, would ask for;
            "undetermined" = a control: a verb in another tense, where nothing says which.
        language: what the sentences are in.
        sentences: the sentence with each of the values or forms; they differ in nothing else but what agrees with a
            value.
        answer: number of the right one, from 0.
        decile: 0 = among the tenth of the facts or nouns that are told most often, to 9; of a composition that of its
            rarer fact. None of what is not told, and of agreement.
        source: the sentence that is given; None = none is.
        source_language: what that is in.
    """

    kind: QuestionKind
    language: str
    sentences: tuple[str, ...]
    answer: int
    decile: int | None = None
    source: str | None = None
    source_language: str | None = None
