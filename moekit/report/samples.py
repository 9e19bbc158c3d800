"""What the model wrote: translations, continuations, restored text.

Words that the reference has too, in the same order (the longest common subsequence of words), are marked.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from moekit.report.run_folder import RunFolder, sides
from moekit.report.view import TaskSamples
from moekit.runs.record import Sample

LONGEST = 900  # characters that a page shows of one text
# Scripts written without spaces are compared letter by letter (a letter keeps its combining marks).
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
)
MAX_WORDS = 400  # beyond, alignment costs more than it shows


def samples(run: RunFolder) -> list[TaskSamples]:
    """Samples by task, and by direction or language."""
    found: dict[str, dict[str, list[Sample]]] = {}
    for sample in run.samples:
        heading = sample.direction.replace("-", " → ", 1) if _translated(sample) else sample.direction
        heading = heading or run.task(sample.task).samples.unknown
        found.setdefault(sample.task, {}).setdefault(heading, []).append(sample)
    return [TaskSamples(run.task(t).title, run.task(t).samples, groups) for t, groups in found.items()]


def languages(sample: Sample) -> tuple[str, str]:
    """Of what was given, and of what was written."""
    return sides(sample.direction) if _translated(sample) else (sample.direction, sample.direction)


def _translated(sample: Sample) -> bool:
    return sample.task == "translation"  # elsewhere a hyphen is part of one language's name


def compared(sample: Sample) -> Agreement:
    """Which words of what is shown agree."""
    return agreement(sample.reference[:LONGEST], sample.hypothesis[:LONGEST])


def marked(pieces: Sequence[tuple[str, bool | None]]) -> Markup:
    """Agreeing words in <mark>, runs of them in one, so that cursive scripts keep their joins."""
    kinds = "".join("-" if agrees is None else "y" if agrees else "n" for _, agrees in pieces)
    html = Markup("")
    for run in re.finditer("y(?:[y-]*y)?|[^y]+", kinds):
        text = "".join(piece for piece, _ in pieces[run.start() : run.end()])
        html += Markup("<mark>{}</mark>").format(text) if run[0].startswith("y") else escape(text)
    return html


def cut(text: str) -> str:
    """`text`, or what of it a page shows."""
    return text[:LONGEST] + rest(text)


def rest(text: str) -> str:
    """How much of `text` a page does not show."""
    more = len(text) - LONGEST
    return f" … ({more:,} more characters)" if more > 0 else ""


@dataclass(frozen=True)
class Agreement:
    """Two texts in pieces; joined, the pieces give the text back.

    Attributes:
        reference: (piece, agrees) of the reference; `agrees` is None for blanks and punctuation.
        hypothesis: the same of the hypothesis.
        matched: words of the hypothesis that agree.
        num_words: words of the reference.
    """

    reference: list[tuple[str, bool | None]]
    hypothesis: list[tuple[str, bool | None]]
    matched: int
    num_words: int


def agreement(reference: str, hypothesis: str) -> Agreement:
    """Align the words of two sentences; case and Unicode composition do not matter, punctuation does not count."""
    texts = pieces(reference), pieces(hypothesis)
    words = [[i for i, piece in enumerate(text) if _is_word(piece)] for text in texts]
    good: tuple[set[int], set[int]] = set(), set()
    if max(map(len, words)) <= MAX_WORDS:
        left, right = ([_key(text[i]) for i in places] for text, places in zip(texts, words, strict=True))
        for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
            for side, first in enumerate(block[:2]):
                good[side].update(words[side][first : first + block.size])
    marked_reference, marked_hypothesis = (
        [(piece, i in agreeing if _is_word(piece) else None) for i, piece in enumerate(text)]
        for text, agreeing in zip(texts, good, strict=True)
    )
    return Agreement(marked_reference, marked_hypothesis, matched=len(good[1]), num_words=len(words[0]))


def pieces(text: str) -> list[str]:
    """Words, and what lies between them; a combining mark never leaves its letter."""
    found: list[str] = []
    previous = ""
    for letter in text:
        kind = "mark" if unicodedata.category(letter)[0] == "M" or letter in "\u200c\u200d" else _kind(letter)
        if found and (kind == "mark" or (kind == previous and kind != "unspaced")):
            found[-1] += letter
        else:
            found.append(letter)
        previous = previous if kind == "mark" and found else kind
    return found


def _kind(letter: str) -> str:
    if _UNSPACED.match(letter):
        return "unspaced"
    return "word" if unicodedata.category(letter)[0] in "LN" or letter in "'\u2019-" else "between"


def _is_word(piece: str) -> bool:
    return any(unicodedata.category(letter)[0] in "LN" for letter in piece)


def _key(word: str) -> str:
    return unicodedata.normalize("NFC", word).casefold()
