"""Catalogs: reading .mo files by the bytes, cleaning, ranking, and splits that cannot leak."""

import gettext as standard
import struct
import warnings
from pathlib import Path

import pytest

from moekit.data.sources import SPLITS, Direction, Gettext, open_source
from moekit.data.sources.gettext import (
    DEFAULT_FOLDER,
    clean,
    count_messages,
    has_placeholder,
    is_identifier,
    read_catalog,
    split_of,
)
from moekit.errors import UserError

SYSTEM = Path(DEFAULT_FOLDER)


def compile_catalog(messages: dict[str, str], *, charset: str = "UTF-8", order: str = "<") -> bytes:
    """A .mo file; plural forms are parted by NUL, a context ends in EOT, as in the format itself."""
    messages = {"": f"Content-Type: text/plain; charset={charset}\n", **messages}
    pairs = sorted((key.encode(charset), value.encode(charset)) for key, value in messages.items())
    start = 28 + 16 * len(pairs)
    tables: list[list[int]] = [[], []]
    text = b""
    for side in (0, 1):
        for pair in pairs:
            tables[side] += [len(pair[side]), start + len(text)]
            text += pair[side] + b"\0"
    numbers = tables[0] + tables[1]
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 28)
    return header + struct.pack(f"{order}{len(numbers)}I", *numbers) + text


def install(folder: Path, language: str, name: str, messages: dict[str, str] | bytes) -> Path:
    path = folder / language / "LC_MESSAGES" / f"{name}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(messages if isinstance(messages, bytes) else compile_catalog(messages))
    return path


def everything(source: Gettext, direction: str) -> dict[str, str]:
    return {a: b for split in SPLITS for a, b in source.parallel(Direction.parse(direction), split)}


def many(prefix: str, number: int = 200) -> dict[str, str]:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    names = [" ".join(words[int(digit)] for digit in str(i)) for i in range(number)]
    return {f"Page {name}": f"{prefix} {name}" for name in names}


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("charset", ["UTF-8", "ISO-8859-1"])
def test_reader_agrees_with_the_standard_library(tmp_path, order, charset):
    messages = {"Good morning": "Grüß Gott", "File": "Datei", "menu\4Open": "Öffnen", "Empty": ""}
    messages["one file\0many files"] = "eine Datei\0viele Dateien"
    path = tmp_path / "x.mo"
    path.write_bytes(compile_catalog(messages, charset=charset, order=order))
    with path.open("rb") as file:
        oracle = standard.GNUTranslations(file)
    assert count_messages(path) == 6
    assert dict(read_catalog(path)) == {
        "Good morning": oracle.gettext("Good morning"),
        "File": oracle.gettext("File"),
        "Open": oracle.pgettext("menu", "Open"),
        "one file": oracle.ngettext("one file", "many files", 1),
        "many files": oracle.ngettext("one file", "many files", 2),
    }


@pytest.mark.parametrize(
    ("forms", "pairs"),
    [
        ("eine Datei\0Dateien", [("a file", "eine Datei"), ("files", "Dateien")]),
        ("soubor\0soubory\0souborů", [("a file", "soubor"), ("files", "souborů")]),
        ("ファイル", [("files", "ファイル")]),
        ("eine Datei\0", []),
    ],
)
def test_plural_forms_become_pairs(tmp_path, forms, pairs):
    path = tmp_path / "x.mo"
    path.write_bytes(compile_catalog({"a file\0files": forms}))
    assert read_catalog(path) == pairs


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda good: b"", "must begin with the bytes de 12 04 95: got an empty file"),
        (lambda good: b"GIF89a" + good[6:], "must begin with the bytes de 12 04 95: got 47 49 46 38"),
        (lambda good: good[:10], "must be whole: it ends at byte 10"),
        (lambda good: good[:40], "must be whole: it ends at byte 40"),
        (lambda good: good[:-20], "must be whole: it ends at byte"),
        (lambda good: good[:8] + b"\xff" * 4 + good[12:], "must be whole: it ends at byte"),
        (lambda good: good[:4] + b"\0\0\7\0" + good[8:], "major revision 0 or 1: got 7"),
        (lambda good: good.replace(b"charset=UTF-8", b"charset=WTF-8"), "charset must be a known one: got 'WTF-8'"),
    ],
)
def test_broken_catalogs_say_why(tmp_path, damage, message):
    path = tmp_path / "x.mo"
    path.write_bytes(damage(compile_catalog({"Yes": "Ja", "No": "Nein"})))
    with pytest.raises(UserError, match=message):
        read_catalog(path)
    with pytest.raises(UserError, match=r"no\.mo: a catalog must be readable"):
        read_catalog(tmp_path / "no.mo")


@pytest.mark.parametrize(
    "charset",
    ["undefined", "idna", "punycode", "unicode_escape", "raw_unicode_escape", "utf-7", "hex", "rot13", "no" * 4000],
)
def test_charsets_that_are_none(tmp_path, charset):
    path = install(tmp_path, "de", "a", compile_catalog({"": f"charset={charset}\n", "File": "Datei"}))
    with pytest.raises(UserError, match=r"a\.mo: the charset must be a known one: got"):
        read_catalog(path)
    install(tmp_path, "de", "b", {"Open file": "Datei \u00f6ffnen"})
    with pytest.warns(UserWarning, match="1 broken catalog skipped"):
        assert everything(Gettext(tmp_path, min_pairs=1, valid_share=0, test_share=0), "en-de") == {
            "Open file": "Datei \u00f6ffnen"
        }


def test_messages_that_overlap_without_end(tmp_path):
    data = bytearray(compile_catalog({f"m{number:03}": "x" for number in range(200)}))
    for row in range(2 * 201):
        struct.pack_into("<2I", data, 28 + 8 * row, len(data), 0)
    (tmp_path / "a.mo").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.mo: a catalog must be whole: .*its messages overlap"):
        read_catalog(tmp_path / "a.mo")


def test_undecodable_messages_are_left_out(tmp_path):
    path = tmp_path / "x.mo"
    path.write_bytes(compile_catalog({"Yes": "Ja", "No": "Nein"}).replace(b"Nein", b"N\xffin"))
    assert read_catalog(path) == [("Yes", "Ja")]


# -- cleaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "cleaned"),
    [
        (("_File", "_Datei"), ("File", "Datei")),
        (("Save _As", "Speichern _unter"), ("Save As", "Speichern unter")),
        (("E_xit", "終了(_X)"), ("Exit", "終了")),
        (("&Open", "Ö&ffnen"), ("Open", "Öffnen")),
        (("no file_name given", "kein file_name angegeben"), ("no file_name given", "kein file_name angegeben")),
        (("Tom & Jerry", "Tom & Jerry"), ("Tom & Jerry", "Tom & Jerry")),
        (("a &lt; b", "a &lt; b"), ("a &lt; b", "a &lt; b")),
        ((" Yes ", "Ja"), ("Yes", "Ja")),
    ],
)
def test_accelerators_go_and_names_stay(pair, cleaned):
    assert clean(*pair) == cleaned


@pytest.mark.parametrize(
    "text", ["%s: no", "%d of %d", "%1$s", "%-10.3f", "%(name)s", "{0}", "{n!r}", "<b>", "&amp;", "${x}"]
)
def test_placeholders(text):
    assert has_placeholder(text)


@pytest.mark.parametrize("text", ["plain text", "100 %", "50% off", "a < b", "set {", "AT&T"])
def test_no_placeholders(text):
    assert not has_placeholder(text)


def test_identifiers():
    assert all(map(is_identifier, ["menu.file.open", "GL_EXT_texture", "application/pdf", "--help", "-v"]))
    assert not any(map(is_identifier, ["Open", "Open file.", "done.", "Yes/No now", "e-mail"]))


# -- the source ------------------------------------------------------------------------------------------------------


def test_pairs_are_cleaned_and_one_per_message(tmp_path):
    install(
        tmp_path,
        "de",
        "b",
        {
            "_File": "_Datei",
            "Open": "Öffnen",
            "Same": "Same",
            "two\nlines": "zwei\nZeilen",
            "123": "eins zwei drei",
            "GL_EXT_texture": "Textur",
            "%s: not found": "%s: nicht gefunden",
            "x" * 300: "zu lang",
            "day": "Tag",
            "bell\a": "Glocke",
        },
    )
    install(tmp_path, "de", "a", {"File": "Akte", "Open": "Öffnen"})
    install(tmp_path, "de.UTF-8", "c", {"File": "Datei"})
    install(tmp_path, "en_GB", "c", {"Color": "Colour"})
    install(tmp_path, "odd+name", "c", {"Color": "Farbe"})
    source = Gettext(tmp_path, min_pairs=1)
    assert source.languages == ("en", "de")
    # "Datei" twice, "Akte" once.
    assert everything(source, "en-de") == {
        "File": "Datei",
        "Open": "Öffnen",
        "%s: not found": "%s: nicht gefunden",
        "day": "Tag",
    }
    strict = Gettext(tmp_path, min_pairs=1, keep_placeholders=False, min_chars=4)
    assert everything(strict, "en-de") == {"File": "Datei", "Open": "Öffnen"}
    assert source.fingerprint() != strict.fingerprint()


def test_held_out_messages_of_one_language_are_in_no_other_training_text(tmp_path):
    install(
        tmp_path, "de", "a", many("Seite", 400) | {f"{key}!": f"{value}!" for key, value in many("Seite", 400).items()}
    )
    install(tmp_path, "fr", "b", {key.lower(): value for key, value in many("la page", 400).items()})
    source = Gettext(tmp_path, min_pairs=1, valid_share=0.1, test_share=0.1)

    def letters(split: str) -> set[str]:
        return {
            "".join(filter(str.isalpha, line.casefold()))
            for direction in source.directions
            for pair in source.parallel(direction, split)
            for line in pair[:1]
            if direction.source == "en"
        }

    train, valid, test = map(letters, SPLITS)
    assert len(valid) > 10
    assert len(test) > 10
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_split_ignores_capitals_punctuation_and_accelerators():
    for text in ("Open the file", "Quit", "Delete %s now"):
        assert len({split_of(form, 0.3, 0.3) for form in (text, text.upper(), f"{text}...", f"_{text}")}) == 1
    splits = [split_of(text, 0.2, 0.3) for text in many("", 900)]
    assert 120 < splits.count("valid") < 240
    assert 200 < splits.count("test") < 340


def test_languages_are_ranked_by_pairs(tmp_path):
    for language, number in (("de", 60), ("fr", 90), ("cs", 30), ("eo", 5)):
        install(tmp_path, language, "a", many(language, number))
    assert Gettext(tmp_path, min_pairs=20, max_languages=2).languages == ("en", "fr", "de")
    assert Gettext(tmp_path, min_pairs=20).languages == ("en", "fr", "de", "cs")
    assert Gettext(tmp_path, min_pairs=1, languages=["eo", "cs"]).languages == ("en", "cs", "eo")
    with pytest.raises(UserError, match=r"min_pairs=20 training pairs: got \d for 'eo'"):
        Gettext(tmp_path, min_pairs=20, languages=["eo"])
    with pytest.raises(UserError, match=r"have catalogs: got 'dee'\. Did you mean 'de'\?"):
        Gettext(tmp_path, languages=["dee"])
    with pytest.raises(UserError, match=r"min_pairs=1,000 training pairs: the most is 8\d for 'fr'"):
        Gettext(tmp_path)


def test_broken_catalogs_are_counted_and_skipped(tmp_path):
    install(tmp_path, "de", "good", many("Seite", 50))
    install(tmp_path, "de", "bad", b"no catalog at all, but long enough")
    install(tmp_path, "de", "short", b"")
    with pytest.warns(UserWarning, match=r"2 broken catalogs skipped; the first: .*bad\.mo: a catalog must begin"):
        source = Gettext(tmp_path, min_pairs=1)
    assert len(everything(source, "en-de")) == 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_languages": 0}, "must be at least 1: got 0, 1000"),
        ({"min_chars": 9, "max_chars": 3}, "0 < min_chars <= max_chars is required: got 9 and 3"),
        ({"valid_share": 0.5, "test_share": 0.5}, "must leave something to train: got 0.5 and 0.5"),
        ({}, r"catalogs must lie in LANGUAGE/LC_MESSAGES/\*\.mo, at any depth: found none"),
    ],
)
def test_wrong_settings(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        Gettext(tmp_path, **settings)


def test_catalogs_of_this_machine():
    languages = [code for code in ("de", "fr", "es", "sv", "pl") if len(list((SYSTEM / code).rglob("*.mo"))) > 3]
    if len(languages) < 2:
        pytest.skip(f"needs translation catalogs in {SYSTEM}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a system may hold broken catalogs
        source = open_source("gettext", languages=languages[:2], min_pairs=100)
    for direction in source.directions:
        assert len(source.parallel(direction, "train")) >= 100
    english = {
        split: {a for d in source.directions if d.source == "en" for a, _ in source.parallel(d, split)}
        for split in SPLITS
    }
    assert not english["train"] & (english["valid"] | english["test"])
