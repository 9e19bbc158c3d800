"""The vocabulary of text: sources and their kinds by name, languages and directions, and questions about text."""

from moekit.source.base import SPLITS, Information, LazySequence, Source, Split
from moekit.source.direction import (
    Direction,
    UnservedDirectionError,
    all_directions,
    choose_directions,
    language_code,
    languages_of,
)
from moekit.source.hashing import chance, digest
from moekit.source.question import DECILES, QUESTION_KINDS, ChoiceQuestion, QuestionKind
from moekit.source.registry import KINDS, open_source, register_source, require_parameter, source_class

__all__ = [
    "DECILES",
    "KINDS",
    "QUESTION_KINDS",
    "SPLITS",
    "ChoiceQuestion",
    "Direction",
    "Information",
    "LazySequence",
    "QuestionKind",
    "Source",
    "Split",
    "UnservedDirectionError",
    "all_directions",
    "chance",
    "choose_directions",
    "digest",
    "language_code",
    "languages_of",
    "open_source",
    "register_source",
    "require_parameter",
    "source_class",
]
