"""How words of a language are made from its sounds: stems, international words, endings in vowel harmony."""

from __future__ import annotations

import random

from moekit.babel.grammar import Grammar, pick

# Abstract sounds of international words, and what each may become, nearest first.
_SOUNDS = {
    "p": "p b f w m",
    "b": "b p mb br w m",
    "m": "m n mb",
    "t": "t d s t' ts",
    "d": "d t nd zd",
    "n": "n m nd",
    "s": "s z sh š x ts h",
    "l": "l r w",
    "r": "r l vr y",
    "k": "k g q c k' h",
    "g": "g k ng gr q h",
    "v": "v w f b vr h",
    "f": "f v p h b",
    "a": "a ai å",
    "e": "e ei é i a",
    "i": "i ei y e u",
    "o": "o ao å ō u",
    "u": "u ou o",
}


class Words:
    """Makes words of one language from its sounds."""

    def __init__(self, grammar: Grammar, seed: int) -> None:
        self.sounds = grammar.sounds
        self.code, self.seed = grammar.code, seed
        self.consonants = tuple(dict.fromkeys(o for o in self.sounds.onsets if o))
        self._front = dict(self.sounds.harmony)
        self._back = {front: back for back, front in self.sounds.harmony}

    def rng(self, key: str) -> random.Random:
        """A generator of its own for every word, so that a larger lexicon keeps the words of a smaller one."""
        return random.Random(f"babel/{self.seed}/{self.code}/{key}")

    def vowels(self, *, front: bool = False) -> tuple[str, ...]:
        """The vowels that may stand in one word."""
        if not self._front:
            return self.sounds.vowels
        return tuple(self._front.values()) if front else tuple(self._front)

    def syllable(self, rng: random.Random, vowels: tuple[str, ...]) -> str:
        """Onset, vowel, coda; frequent onsets are likelier."""
        onsets = self.sounds.onsets
        return onsets[int(rng.random() ** 1.4 * len(onsets))] + pick(rng, vowels) + pick(rng, self.sounds.codas)

    def stem(self, rng: random.Random, syllables: int, *, closed: bool = False) -> str:
        """A stem of so many syllables; a `closed` one ends in a consonant."""
        vowels = self.vowels(front=rng.random() < 0.5)
        word = "".join(self.syllable(rng, vowels) for _ in range(syllables))
        if closed and word[-1] in "".join(self.sounds.vowels):
            word += pick(rng, self.consonants)
        return word

    def adapt(self, international: str, *, closed: bool = False) -> str:
        """How the language pronounces a word that many languages share."""
        vowels, consonants = self.vowels(), self.consonants
        word = "".join(
            next(
                (near for near in _SOUNDS[sound].split() if near in (vowels if sound in "aeiou" else consonants)), sound
            )
            for sound in international
        )
        if closed:
            word = word.rstrip("".join(self.sounds.vowels)) or word
        return word

    def is_front(self, word: str) -> bool:
        """Whether the last vowel that takes part in harmony is a front one."""
        for letter in reversed(word):
            if letter in self._back:
                return True
            if letter in self._front:
                return False
        return False

    def attach(self, word: str, ending: str, buffer: str) -> str:
        """`word` with `ending` in its vowel harmony; `buffer` parts two vowels."""
        if not ending:
            return word
        if self._front and self.is_front(word):
            ending = "".join(self._front.get(letter, letter) for letter in ending)
        vowels = "".join(self.sounds.vowels)
        return word + (buffer if word[-1] in vowels and ending[0] in vowels else "") + ending
