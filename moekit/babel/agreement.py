"""Does a model know which form of a word agrees? A held-out sentence, and the same with one word in a wrong form.

Minimal pairs, as in arXiv:1611.01368 (subject and verb, with nouns of the other number between them) and
arXiv:1912.00582 (BLiMP: a model has to find the grammatical one of two sentences likelier).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moekit.babel.language import Language, Mark
from moekit.source import QuestionKind

Ints = npt.NDArray[np.int64]
_KINDS: tuple[QuestionKind, ...] = ("verb", "verb_attractor", "adjective", "article")
_CONTROL: QuestionKind = "undetermined"


class Pair(NamedTuple):
    """A minimal pair.

    Attributes:
        kind: what agrees, or the control.
        right: the sentence as it is.
        wrong: the same with another form of one word.
        forms: that word in both.
    """

    kind: QuestionKind
    right: str
    wrong: str
    forms: tuple[str, str]


class Meanings(NamedTuple):
    """Held-out meanings, rows of `moekit.babel.meaning`, of which sentences are asked.

    Attributes:
        rows: different ones.
        in_two_tenses: twice the same but for the tense, where nothing says which; no training text has either.
    """

    rows: Sequence[Sequence[int]]
    in_two_tenses: Sequence[tuple[Sequence[int], Sequence[int]]]


def in_two_tenses(
    rows: Ints, tense: int, adverb: int, held_out: Callable[[Ints], npt.NDArray[np.bool_]]
) -> tuple[Ints, Ints]:
    """Rows without an adverb, which may tell the time, and the same in another tense that is held out as well.

    Args:
        rows: Int64[n, columns].
        tense: number of the column; there are three tenses.
        adverb: number of the column, in which 0 is none.
        held_out: says of rows whether no training text has them.
    """
    timeless = rows[rows[:, adverb] == 0]
    given, turned = np.concatenate([timeless, timeless]), np.concatenate([timeless, timeless])
    turned[: len(timeless), tense] = (timeless[:, tense] + 1) % 3
    turned[len(timeless) :, tense] = (timeless[:, tense] + 2) % 3
    kept = held_out(turned) if len(turned) else np.zeros(0, dtype=bool)
    return given[kept], turned[kept]


def ask(language: Language, meanings: Meanings, each: int, generator: np.random.Generator) -> list[Pair]:
    """Up to `each` pairs of every kind that the language has; an odd number counts as the next even one.

    Pairs come in twos that have the same two forms, and each of them is right once. So whoever knows how often forms
    occur, how long they are or how they are spelled, and not what they agree with, answers exactly half of the pairs.
    Forms that never can be right in this text, as plurals where all subjects are singular, are therefore not asked.
    Pairs of forms take turns. The control is asked where anything else is.

    Args:
        language: whose grammar decides.
        meanings: of the sentences.
        each: pairs of a kind.
        generator: where draws come from.
    """
    found = list(_pairs(language, meanings.rows))
    asked = [pair for kind in _KINDS for pair in _in_twos([p for p in found if p.kind == kind], each, generator)]
    return asked + _in_twos(list(_undetermined(language, meanings)), each, generator) if asked else []


def _pairs(language: Language, rows: Sequence[Sequence[int]]) -> Iterator[Pair]:
    """Every word of every sentence that agrees with a noun, with each wrong form that is written otherwise."""
    for row in rows:
        parts, marks = language.marked(row)
        for mark in marks:
            if not mark.forms:
                continue
            kind: QuestionKind = "adjective" if mark.kind == "adjective" else "article"
            wrong = {form for forms in mark.forms for form in forms}
            if mark.kind == "verb":
                attracting = _attracting(language, mark, marks) - {parts[mark.place]}
                kind, wrong = ("verb_attractor", attracting) if attracting else ("verb", wrong)
            for form in sorted(wrong - {parts[mark.place]}):
                if pair := _pair(kind, parts, [*parts[: mark.place], form, *parts[mark.place + 1 :]]):
                    yield pair


def _attracting(language: Language, verb: Mark, marks: Sequence[Mark]) -> set[str]:
    """The forms that a verb would have if it agreed with a noun between itself and its subject."""
    subject = next(mark.place for mark in marks if mark.kind == "subject")
    first, last = sorted((subject, verb.place))
    return {
        verb.forms[language.forms.noun_class[mark.noun - 1]][mark.plural]
        for mark in marks
        if mark.kind == "noun" and first < mark.place < last
    }


def _undetermined(language: Language, meanings: Meanings) -> Iterator[Pair]:
    """Sentences in one tense or another, of which a text could have either; each form is right as often."""
    right: dict[tuple[str, ...], int] = {}
    for rows in meanings.in_two_tenses:
        sides = [language.say(row).split() for row in rows]
        pair = _pair(_CONTROL, *sides)
        if pair is None:  # a tense without a particle, where another has one
            continue
        key = tuple(sorted(pair.forms))
        first = right.get(key, 0)  # how much more often the first of the two forms is right
        wanted = key[0] if first <= 0 else key[1]
        right[key] = first + (1 if wanted == key[0] else -1)
        yield (
            pair
            if pair.forms[0] == wanted
            else pair._replace(right=pair.wrong, wrong=pair.right, forms=pair.forms[::-1])
        )


def _pair(kind: QuestionKind, right: Sequence[str], wrong: Sequence[str]) -> Pair | None:
    """Two sentences from their parts; None where they do not differ in just one word."""
    sides = " ".join(right), " ".join(wrong)
    words = [side.split() for side in sides]
    differing = [(a, b) for a, b in zip(*words, strict=False) if a != b]
    if len(words[0]) != len(words[1]) or len(differing) != 1:
        return None
    return Pair(kind, *sides, forms=differing[0])


def _in_twos(pairs: Sequence[Pair], each: int, generator: np.random.Generator) -> list[Pair]:
    """Up to `each` pairs, two after the other of the same forms with each of them right once; a sentence is in one."""
    waiting: dict[tuple[str, ...], dict[str, list[Pair]]] = {}
    # Only `random` is drawn from: the streams of the other methods may change between numpy versions.
    for number in np.argsort(generator.random(len(pairs))).tolist():
        pair = pairs[number]
        key = tuple(sorted(pair.forms))
        waiting.setdefault(key, {form: [] for form in key})[pair.forms[0]].append(pair)
    turns = {key: [iter(own) for own in by_form.values()] for key, by_form in waiting.items()}
    found: list[Pair] = []
    used: set[str] = set()
    while turns:
        for key, both in list(turns.items()):
            if len(found) >= each:
                return found
            two: list[Pair] = []
            for own in both:
                if pair := next((p for p in own if used.isdisjoint((p.right, p.wrong))), None):
                    used.update((pair.right, pair.wrong))
                    two.append(pair)
            if len(two) == len(both):
                found += two
            else:
                del turns[key]
    return found
