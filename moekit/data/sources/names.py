"""Which names of files, columns and keys are languages: what looks like a language code, or what the user says."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from moekit.errors import UserError
from moekit.source import Source, language_code

_T = TypeVar("_T")
log = logging.getLogger(__name__)

# Language, script, region, variant: en, zho_Hans, pt-BR, zh_cn, es_419, sr@latin. After a language of three letters a
# region has capitals: doc_id and seg_no are columns.
_CODE = re.compile(
    r"(?:[a-z]{2,3}|[A-Z]{2})(?:[-_](?:[A-Z][a-z]{3}|hans|hant|latn|cyrl))?"
    r"(?:[-_](?:[A-Z]{2}|\d{3})|(?<=^[a-z]{2})[-_][a-z]{2,3})?(?:[-_](?:tarask|valencia))?(?:@[a-z]+)?"
)
# Endings of files and headings of columns that have the form of a code. Some are codes of small languages: whoever has
# text in one says so.
_NOT_CODES = """
    txt tsv csv md mo po gz zip xz bz bz2 zst tar tgz log bpe spm py sh js db ids idx key tag seg row num len url src
    tgt trg ref hyp out old new bak tmp raw tok bin vec npy npz pkl hdf sql xml htm pdf doc rst tex rtf yml ini cfg lst
    map dic dct voc vcb img sum sig sgm sid uid pid
"""
_NO_LANGUAGES = frozenset(_NOT_CODES.split())


def looks_like_language(name: str) -> bool:
    """Whether a name is a language unless somebody says otherwise: a language code such as ``en`` or ``eng_Latn``.

    Source: the form is that of BCP 47 (RFC 5646 section 2.1), with ``_`` for ``-`` and the modifiers of POSIX locales.
    """
    return _CODE.fullmatch(name) is not None and name.lower() not in _NO_LANGUAGES


class OtherLanguagesError(UserError):
    """A file of parallel text is in languages of which fewer than two are read."""


class LanguageNames:
    """What counts as a language in a corpus, and what was left out because it does not.

    Args:
        languages: only these: codes, or codes by the name in the data, as ``{"src": "en", "tgt": "de"}``. None =
            everything that looks like a language code.

    Raises:
        UserError: `languages` is empty, or a text, or one of them is no language code.
    """

    def __init__(self, languages: Sequence[str] | Mapping[str, str] | None = None) -> None:
        if isinstance(languages, str) or (languages is not None and not languages):
            raise UserError(f"languages must be a list of at least one language code: got {languages!r}.")
        named = languages if isinstance(languages, Mapping) else {code: code for code in languages or ()}
        self._named = {_plain(name): language_code(code, "languages") for name, code in named.items()}
        self._left_out: dict[str, None] = {}

    @property
    def codes(self) -> tuple[str, ...]:
        """What the user named; nothing where everything that looks like a code is read."""
        return tuple(dict.fromkeys(self._named.values()))

    def code(self, name: str) -> str | None:
        """The language that a name stands for, or None."""
        if self._named:
            return self._named.get(_plain(name))
        return language_code(name) if looks_like_language(name.strip()) else None

    def choose(self, names: Iterable[str], where: str) -> dict[str, str]:
        """The languages among `names`, which are of columns or keys: codes by name; others are left out.

        Raises:
            OtherLanguagesError: two or more look like languages, and the user named fewer than two of them.
            UserError: fewer than two are languages, or two are the same one; `where` begins the message.
        """
        given = list(names)
        found = [(name, code) for name in given if (code := self.code(name)) is not None]
        chosen, codes = dict(found), [code for _, code in found]
        if twice := next((code for code in codes if codes.count(code) > 1), None):
            same = " and ".join(name for name, code in found if code == twice)
            raise UserError(f"{where}: every language may stand there once: got {same}, which are all {twice!r}.")
        if len(chosen) < 2:
            wanted = f"of {', '.join(self.codes)}" if self._named else "as en and de"
            got = ", ".join(name[:30] for name in given[:8]) or "nothing"
            others = bool(self._named) and sum(map(looks_like_language, given)) > 1
            raise (OtherLanguagesError if others else UserError)(
                f"{where}: at least two language codes are required, {wanted}: got {got}. Where languages have other "
                "names, say which are which, as --data.languages src=en,tgt=de."
            )
        self.leave_out(name for name in given if name not in chosen)
        return chosen

    def of_these(self, blocks: Iterable[Callable[[], _T]]) -> list[_T]:
        """What `blocks` read, without files of other languages than the user named.

        Raises:
            OtherLanguagesError: no file is left.
        """
        found: list[_T] = []
        others: list[OtherLanguagesError] = []
        for read in blocks:
            try:
                found.append(read())
            except OtherLanguagesError as error:
                others.append(error)
        if others and not found:
            raise others[0]
        return found

    def check(self, source: Source) -> None:
        """Raise UserError, with the nearest name, if a language that was named is none of a corpus."""
        for code in self.codes:
            source.check_language(code)

    def leave_out(self, names: Iterable[str]) -> None:
        """Remember what is not read, for `say`."""
        self._left_out.update(dict.fromkeys(names))

    def say(self, kind: str, where: Path) -> None:
        """Name what was left out, in one line; nothing where the user has said what is read."""
        if self._named or not self._left_out:
            return
        names = list(self._left_out)
        shown = ", ".join(name[:40] for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        log.warning(
            "%s: left out of %s, as no text of a language: %s. --data.languages names those that are.",
            kind, where, shown,
        )  # fmt: skip


def named_languages(given: Sequence[str] | Mapping[str, str] | str | None) -> tuple[str, ...] | dict[str, str] | None:
    """Languages as settings give them: a list or mapping, or text such as ``en,de`` and ``src=en,tgt=de``."""
    if isinstance(given, Mapping):
        return dict(given) or None
    listed = given.split(",") if isinstance(given, str) else given or ()
    parts = [part.partition("=") for part in listed if part.strip()]
    if not any(equals for _, equals, _ in parts):
        return tuple(name.strip() for name, _, _ in parts) or None
    return {name.strip(): (code if equals else name).strip() for name, equals, code in parts}


def _plain(name: str) -> str:
    return name.strip().replace("-", "_")
