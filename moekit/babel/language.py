"""A language that speaks: `Language.say(row)` puts a meaning into words by its own grammar."""

from __future__ import annotations

from collections.abc import Sequence

from moekit.babel import meaning as m
from moekit.babel.concepts import NAME, Concepts
from moekit.babel.grammar import Grammar
from moekit.babel.lexicon import ACCUSATIVE, DATIVE, GENITIVE, NOMINATIVE, build_forms

_PARTICIPANTS = {"S": (m.SUBJECT, NOMINATIVE), "O": (m.OBJECT, ACCUSATIVE), "R": (m.RECIPIENT, DATIVE)}


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
        out: list[str] = []
        forms = self.forms
        for letter in self.grammar.clause:
            if letter == "V":
                agreement, plural = forms.noun_class[row[m.SUBJECT] - 1], self._plural(row[m.SUBJECT + m.COUNT])
                out.append(forms.verb[row[m.VERB] - 1][agreement][plural][row[m.TENSE]][row[m.NEGATIVE]])
            elif letter == "A":
                if row[m.ADVERB]:
                    out.append(forms.adverb[row[m.ADVERB] - 1])
            elif letter in _PARTICIPANTS:
                start, case = _PARTICIPANTS[letter]
                if row[start]:
                    self._phrase(row, start, case, out)
            elif row[m.LOCATION]:
                adposition = forms.adposition[row[m.ADPOSITION] - 1]
                if self.grammar.prepositions:
                    out.append(adposition)
                self._phrase(row, m.LOCATION, DATIVE, out, governed=True)
                if not self.grammar.prepositions:
                    out.append(adposition)
        return " ".join(out)

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

    def _phrase(self, row: Sequence[int], start: int, case: int, out: list[str], *, governed: bool = False) -> None:
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
                out.append(forms.noun[noun - 1][plural][definite][case])
            elif letter == "J":
                if adjective:
                    agreement = forms.noun_class[noun - 1]
                    out.append(forms.adjective[adjective - 1][agreement][plural][case])
                    if second:
                        out.append(forms.adjective[second - 1][agreement][plural][case])
            elif letter == "D":
                if demonstrative:
                    out.append(forms.demonstrative[demonstrative - 1])
                elif forms.article and count < 2 and not self._is_name[noun - 1]:
                    out.append(forms.article[forms.noun_class[noun - 1]][plural])
            elif letter == "Q":
                if count > 1:
                    out.append(forms.numeral[count - 2])
            elif letter == "G":
                if possessor:
                    self._possessor(possessor, row[start + m.POSSESSOR_PLURAL], out)
            elif row[start + m.RELATIVE]:
                self._relative(row, start, out)
        if particle:
            out.append(particle)

    def _bare(self, noun: int, plural: int, case: int, out: list[str]) -> None:
        """A noun with its article and nothing else."""
        forms = self.forms
        if forms.article and not self._is_name[noun - 1]:
            out.append(forms.article[forms.noun_class[noun - 1]][plural])
        out.append(forms.noun[noun - 1][plural][True][case])

    def _possessor(self, noun: int, plural: int, out: list[str]) -> None:
        particle = self.forms.case_particle[GENITIVE]
        before = self.grammar.case == "none" and not self._possessor_first
        if particle and before:
            out.append(particle)
        self._bare(noun, plural, GENITIVE, out)
        if particle and not before:
            out.append(particle)

    def _relative(self, row: Sequence[int], start: int, out: list[str]) -> None:
        verb, other, plural = row[start + m.RELATIVE : start + m.PHRASE]
        clause: list[str] = []
        if other:
            self._bare(other, plural, ACCUSATIVE, clause)
            clause.extend(filter(None, [self.forms.case_particle[ACCUSATIVE]]))
        clause.insert(0 if self._verb_first else len(clause), self.forms.relative_verb[verb - 1])
        clause.insert(len(clause) if self._relative_first else 0, self.forms.relativizer)
        out += clause
