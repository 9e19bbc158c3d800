"""A language that speaks: `Language.say(row)` puts a meaning into words by its own grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from moekit.babel import meaning as m
from moekit.babel.concepts import NAME, Concepts
from moekit.babel.grammar import Grammar
from moekit.babel.lexicon import ACCUSATIVE, DATIVE, GENITIVE, NOMINATIVE, build_forms

_PARTICIPANTS = {"S": (m.SUBJECT, NOMINATIVE), "O": (m.OBJECT, ACCUSATIVE), "R": (m.RECIPIENT, DATIVE)}


class Mark(NamedTuple):
    """A noun of a sentence, or a word that agrees with one.

    Attributes:
        place: where it stands among the parts of the sentence, from 0.
        kind: what it is; "subject" is the noun that the verb agrees with.
        noun: of a noun itself, else of its head, counted from 1.
        plural: whether that noun is plural: 0 or 1.
        forms: of a word that agrees its forms ``[class][plural]``, all else as it is; none of a noun.
    """

    place: int
    kind: Literal["subject", "noun", "verb", "adjective", "article"]
    noun: int
    plural: int
    forms: Sequence[Sequence[str]] = ()


_Marks = list[Mark] | None


class Language:
    """A grammar and its words.

    Attributes:
        grammar: the rules.
        forms: every word, inflected.
        code, name: what it is called.
    """

    def __init__(self, grammar: Grammar, concepts: Concepts, *, seed: int = 0, cognates: float = 0.15) -> None:
        self.grammar = grammar
        self.code, self.name = grammar.code, grammar.name
        self.forms = build_forms(grammar, concepts, seed=seed, cognates=cognates)
        self._is_name = [noun.kind == NAME for noun in (*concepts.nouns, *concepts.unsaid)]
        self._verb_first = grammar.clause.index("V") < grammar.clause.index("O")
        self._relative_first = grammar.phrase.index("C") < grammar.phrase.index("N")
        self._possessor_first = grammar.phrase.index("G") < grammar.phrase.index("N")

    def say(self, row: Sequence[int]) -> str:
        """The sentence for a row of `MeaningSampler` (a list of plain integers is fastest)."""
        return " ".join(self._clause(row))

    def marked(self, row: Sequence[int]) -> tuple[list[str], list[Mark]]:
        """The parts of the sentence for a row, which joined by spaces are the sentence; its nouns, and what agrees.

        A part is a word with the particles of its form.
        """
        marks: list[Mark] = []
        return self._clause(row, marks), marks

    def _clause(self, row: Sequence[int], marks: _Marks = None) -> list[str]:
        out: list[str] = []
        forms = self.forms
        for letter in self.grammar.clause:
            if letter == "V":
                subject, plural = row[m.SUBJECT], self._plural(row[m.SUBJECT + m.COUNT])
                verb, tense, negative = forms.verb[row[m.VERB] - 1], row[m.TENSE], row[m.NEGATIVE]
                if marks is not None:
                    table = [[by_tense[tense][negative] for by_tense in by_number] for by_number in verb]
                    marks.append(Mark(len(out), "verb", subject, plural, table))
                out.append(verb[forms.noun_class[subject - 1]][plural][tense][negative])
            elif letter == "A":
                if row[m.ADVERB]:
                    out.append(forms.adverb[row[m.ADVERB] - 1])
            elif letter in _PARTICIPANTS:
                start, case = _PARTICIPANTS[letter]
                if row[start]:
                    self._phrase(row, start, case, out, marks)
            elif row[m.LOCATION]:
                adposition = forms.adposition[row[m.ADPOSITION] - 1]
                if self.grammar.prepositions:
                    out.append(adposition)
                self._phrase(row, m.LOCATION, DATIVE, out, marks, governed=True)
                if not self.grammar.prepositions:
                    out.append(adposition)
        return out

    def object_alone(self, noun: int) -> str:
        """One noun (counted from 1) as the object of a clause that is left out: the answer to a question."""
        row, out = [0] * m.WIDTH, list[str]()
        row[m.OBJECT + m.NOUN] = noun
        self._phrase(row, m.OBJECT, ACCUSATIVE, out)
        return " ".join(out)

    def objects(self, noun: int) -> frozenset[str]:
        """One noun (counted from 1) in all its forms, and with its article where an object has one: "tol idimo"."""
        bare: list[str] = []
        self._bare(noun, 0, ACCUSATIVE, bare)
        particle = self.forms.case_particle[ACCUSATIVE]
        phrase = [word for word in self.object_alone(noun).split() if word != particle]
        forms = (case for plural in self.forms.noun[noun - 1] for definite in plural for case in definite)
        return frozenset([*forms, " ".join(bare), " ".join(phrase)])

    def entry(self, noun: int, told: Sequence[tuple[int, int]]) -> str:
        """An entry of an encyclopedia: a noun, a colon, and verbs with their objects, all bare (counted from 1)."""
        forms = self.forms
        out = [forms.noun[noun - 1][0][False][NOMINATIVE], ":"]
        for verb, value in told:
            out += [forms.relative_verb[verb - 1], forms.noun[value - 1][0][False][NOMINATIVE]]
        return " ".join(out)

    def word_by_word(self, text: str) -> str:
        """English for a text, word by word; what is no word of the language stands in brackets: ``[word?]``."""
        known = self.forms.glosses
        return " ".join(known.get(word, f"[{word}?]") if any(map(str.isalpha, word)) else word for word in text.split())

    def _plural(self, count: int) -> int:
        return int(count == 1 or (count > 1 and self.grammar.plural_after_numeral))

    def _phrase(
        self, row: Sequence[int], start: int, case: int, out: list[str], marks: _Marks = None, *, governed: bool = False
    ) -> None:
        """Say one participant; a `governed` one has an adposition and needs no case particle."""
        forms = self.forms
        noun, count, demonstrative, adjective, second, possessor = row[start : start + 6]
        plural = self._plural(count)
        particle = "" if governed else forms.case_particle[case]
        if particle and self.grammar.case == "none" and self.grammar.prepositions:
            out.append(particle)
            particle = ""
        for letter in self.grammar.phrase:
            if letter == "N":
                definite = not demonstrative and count < 2
                if marks is not None:
                    marks.append(Mark(len(out), "subject" if start == m.SUBJECT else "noun", noun, plural))
                out.append(forms.noun[noun - 1][plural][definite][case])
            elif letter == "J":
                for number in filter(None, (adjective, second)):
                    table = forms.adjective[number - 1]
                    if marks is not None:
                        by_case = [[cases[case] for cases in by_number] for by_number in table]
                        marks.append(Mark(len(out), "adjective", noun, plural, by_case))
                    out.append(table[forms.noun_class[noun - 1]][plural][case])
            elif letter == "D":
                if demonstrative:
                    out.append(forms.demonstrative[demonstrative - 1])
                elif count < 2:
                    self._article(noun, plural, out, marks)
            elif letter == "Q":
                if count > 1:
                    out.append(forms.numeral[count - 2])
            elif letter == "G":
                if possessor:
                    self._possessor(possessor, row[start + m.POSSESSOR_PLURAL], out, marks)
            elif row[start + m.RELATIVE]:
                self._relative(row, start, out, marks)
        if particle:
            out.append(particle)

    def _article(self, noun: int, plural: int, out: list[str], marks: _Marks) -> None:
        """The word before a noun, where the language has one and it is no name."""
        if not self.forms.article or self._is_name[noun - 1]:
            return
        if marks is not None:
            marks.append(Mark(len(out), "article", noun, plural, self.forms.article))
        out.append(self.forms.article[self.forms.noun_class[noun - 1]][plural])

    def _bare(self, noun: int, plural: int, case: int, out: list[str], marks: _Marks = None) -> None:
        """A noun with its article and nothing else."""
        self._article(noun, plural, out, marks)
        if marks is not None:
            marks.append(Mark(len(out), "noun", noun, plural))
        out.append(self.forms.noun[noun - 1][plural][True][case])

    def _possessor(self, noun: int, plural: int, out: list[str], marks: _Marks) -> None:
        particle = self.forms.case_particle[GENITIVE]
        before = self.grammar.case == "none" and not self._possessor_first
        if particle and before:
            out.append(particle)
        self._bare(noun, plural, GENITIVE, out, marks)
        if particle and not before:
            out.append(particle)

    def _relative(self, row: Sequence[int], start: int, out: list[str], marks: _Marks) -> None:
        verb, other, plural = row[start + m.RELATIVE : start + m.PHRASE]
        said = self.forms.relative_verb[verb - 1]
        out += [] if self._relative_first else [self.forms.relativizer]
        out += [said] if self._verb_first else []
        if other:
            self._bare(other, plural, ACCUSATIVE, out, marks)
            out += filter(None, [self.forms.case_particle[ACCUSATIVE]])
        out += [] if self._verb_first else [said]
        out += [self.forms.relativizer] if self._relative_first else []
