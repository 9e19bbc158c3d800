"""moses, jsonl, tsv and plain text: what they read, and what they say when something is wrong."""

import gzip
import json
import pickle
import warnings
from pathlib import Path

import pytest

from moekit.data.sources import Direction, JsonLines, Moses, Text, Tsv, open_source
from moekit.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real corpora, which are not part of the project")
EN_DE, DE_EN = Direction("en", "de"), Direction("de", "en")


def write(folder: Path, **files: str | bytes) -> Path:
    """Files in `folder`; a double underscore in a name stands for a dot."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def rows(*pairs: tuple[str, str]) -> str:
    return "".join(json.dumps({"translation": {"en": a, "de": b}}, ensure_ascii=False) + "\n" for a, b in pairs)


# -- moses -----------------------------------------------------------------------------------------------------------


def test_moses_reads_plain_and_packed(tmp_path):
    write(tmp_path, train__en="a\nb\n", train__de__gz=gzip.compress(b"A\nB"), dev__en="c\n", dev__de="C\n")
    write(tmp_path, README__md="not text", notes="nor this", train__json="{}", train__txt="x")
    source = Moses(tmp_path)
    assert source.languages == ("de", "en")
    assert set(source.directions) == {EN_DE, DE_EN}
    assert list(source.parallel(EN_DE, "train")) == [("a", "A"), ("b", "B")]
    assert source.parallel(DE_EN, "valid")[0:1] == [("C", "c")]
    assert len(source.parallel(EN_DE, "test")) == 0
    assert source.monolingual("de", "train") == ["A", "B"]


def test_moses_reads_files_named_after_pairs(tmp_path):
    write(tmp_path, **{"train__en-de__en": "a\n", "train__en-de__de": "A\n"})
    write(tmp_path, **{"train__en-fr__en": "x\ny\n", "train__en-fr__fr": "X\nY\n"})
    source = Moses(tmp_path)
    assert {str(d) for d in source.directions} == {"en-de", "de-en", "en-fr", "fr-en"}
    assert list(source.parallel(Direction("fr", "en"), "train")) == [("X", "x"), ("Y", "y")]
    assert source.monolingual("en", "train") == ["a", "x", "y"]


def test_pivot_is_english_where_several_languages_are_aligned(tmp_path):
    write(tmp_path, train__cs="c\n", train__de="d\n", train__en="e\n")
    assert {str(d) for d in Moses(tmp_path).directions} == {"cs-en", "en-cs", "de-en", "en-de"}
    assert len(Moses(tmp_path, pivot=None).directions) == 6
    assert {str(d) for d in Moses(tmp_path, pivot="cs").directions} == {"cs-de", "de-cs", "cs-en", "en-cs"}
    chosen = Moses(tmp_path, directions=["cs-de"])
    assert chosen.languages == ("cs", "de")
    assert list(chosen.parallel(Direction("cs", "de"), "train")) == [("c", "d")]
    with pytest.raises(UserError, match=r"pivot must be a language of the data: got 'ee'"):
        Moses(tmp_path, pivot="ee")


def test_other_stems(tmp_path):
    write(tmp_path, **{"europarl-v7__en": "a\n", "europarl-v7__de": "A\n", "news__en": "b\n", "news__de": "B\n"})
    source = Moses(tmp_path, stems={"train": "europarl-v7", "dev": "news"})
    assert list(source.parallel(EN_DE, "valid")) == [("b", "B")]
    with pytest.raises(UserError, match="stems must name files of train, valid or test: got 'extra'"):
        Moses(tmp_path, stems={"extra": "news"})


def test_lines_end_at_line_feeds_only(tmp_path):
    odd = "one\u2028still one\x85and\x0b\x0c\x1cyet\r\n\ufefftwo\r\nthree"
    write(tmp_path, train__en="\ufeff" + odd, train__de="eins\nzwei\ndrei\n")
    pairs = Moses(tmp_path).parallel(EN_DE, "train")
    assert [pair[1] for pair in pairs] == ["eins", "zwei", "drei"]
    assert pairs[0][0] == "one\u2028still one\x85and\x0b\x0c\x1cyet"
    assert pairs[1][0].endswith("two")


def test_empty_lines_are_counted_and_dropped_in_pairs(tmp_path):
    write(tmp_path, train__en="a\n\nc\nd\n  \n", train__de="A\nB\nC\n\nE\n", train__fr="1\n2\n3\n4\n5\n")
    with pytest.warns(UserWarning, match=r"train\.de, line 4 \(1 for de\); .*train\.en, line 2 \(2 for en\)") as caught:
        source = Moses(tmp_path, pivot=None)
    assert len(caught) == 1
    assert list(source.parallel(EN_DE, "train")) == [("a", "A"), ("c", "C")]
    assert list(source.parallel(Direction("de", "fr"), "train")) == [("A", "1"), ("B", "2"), ("C", "3"), ("E", "5")]
    assert source.monolingual("en", "train") == ["a", "c", "d"]
    with pytest.raises(UserError, match=r"no line may be empty: first at .*train\.de, line 4"):
        Moses(tmp_path, strict=True)


def test_fingerprint_follows_content_and_settings(tmp_path):
    write(tmp_path, train__en="a\nb\n", train__de="A\nB\n")
    first = Moses(tmp_path).fingerprint()
    assert Moses(tmp_path).fingerprint() == first
    assert Moses(tmp_path, directions=["en-de"]).fingerprint() != first
    write(tmp_path, train__de="A\nC\n")
    assert Moses(tmp_path).fingerprint() != first
    copy = pickle.loads(pickle.dumps(Moses(tmp_path)))
    assert copy.fingerprint() == Moses(tmp_path).fingerprint()


def test_fingerprint_follows_what_was_read_of_a_file(tmp_path):
    """Caches of tokens are named after it: a column that was wrong must not stay."""
    write(tmp_path, train__tsv="a\tB\tx\nc\tD\ty\n", head__tsv="src\tmt\tref\na\tB\tx\n")
    write(tmp_path, rows__jsonl='{"translation": {"src": "a", "mt": "B", "ref": "x"}}\n')
    second, third = (Tsv(tmp_path / "train.tsv", columns=names) for names in (["en", "de", "-"], ["en", "-", "de"]))
    assert second.parallel(EN_DE, "train") != third.parallel(EN_DE, "train")
    assert second.fingerprint() != third.fingerprint()
    for kind, name in ((Tsv, "head.tsv"), (JsonLines, "rows.jsonl")):
        wrong, right = (kind(tmp_path / name, languages={"src": "en", key: "de"}) for key in ("mt", "ref"))
        assert wrong.parallel(EN_DE, "train") != right.parallel(EN_DE, "train")
        assert wrong.fingerprint() != right.fingerprint()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"must be named SPLIT\.LANGUAGE or SPLIT\.PAIR\.LANGUAGE.*found none among 0 files"),
        ({"data__bin": "x", "other__en": "y"}, "found none among 2 files"),
        ({"train__en": "a\n"}, r"train\.en: parallel text must have at least two languages"),
        ({"train__en": "a\nb\n", "train__de": "A\n"}, r"got 1 in .*train\.de and 2 in .*train\.en"),
        ({"train__en": "a\n", "train__de": ""}, r"train\.de: a file must hold at least one line: got an empty file"),
        ({"train__en": "a\n", "train__de": "\n"}, r"train\.de, line 1: a file must hold text.*only empty"),
        (
            {"train__en": b"a\nnot \xe9 utf\n", "train__de": "A\nB\n"},
            r"train\.en, line 2, byte 5 of the line: text must be UTF-8: got the byte 0xe9",
        ),
        (
            {"train__en": b"\xef\xbb\xbf\xff\n", "train__de": "A\n"},
            r"train\.en, line 1, byte 1 of the line: text must be UTF-8",
        ),
        (
            {"train__en": "a\n", "train__de__gz": b"no archive"},
            r"train\.de\.gz: a file named \.gz must be a whole gzip",
        ),
        (
            {"train__en": "a\n", "train__de__gz": gzip.compress(b"A\n" * 999)[:-9]},
            r"train\.de\.gz: a file named \.gz must be a whole gzip archive",
        ),
        ({"train__en": "a\n", "train__de__gz": b""}, r"train\.de\.gz: .*got an empty file"),
        (
            {"train__en": "a\n", "train__en__gz": gzip.compress(b"a\n")},
            r"train\.en and train\.en\.gz are the same file",
        ),
        ({"valid__en": "a\n", "dev__en": "a\n"}, r"dev\.en and valid\.en both hold valid text of 'en'"),
        ({"train__en-de__fr": "a\n"}, r"train\.en-de\.fr: the language must be one of the pair en-de: got 'fr'"),
    ],
)
def test_moses_names_what_is_wrong(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(UserError, match=message):
        Moses(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(name.replace("__", ".") for name in files)


def test_paths_that_are_no_folders(tmp_path):
    write(tmp_path, train__en="a\n")
    with pytest.raises(UserError, match=r"moses: the path must be a folder: got a file: .*train\.en"):
        Moses(tmp_path / "train.en")
    with pytest.raises(UserError, match="text: the path must be a folder: got nothing there"):
        Text(tmp_path / "nowhere")
    with pytest.raises(UserError, match="jsonl: the path must be a file or a folder: there is nothing at"):
        JsonLines(tmp_path / "nowhere")


# -- jsonl -----------------------------------------------------------------------------------------------------------


def test_jsonl_reads_one_folder_many_folders_and_one_file(tmp_path):
    write(
        tmp_path,
        **{"train__jsonl": rows(("a", "A"), ("b", "B")), "dev__json__gz": gzip.compress(rows(("c", "C")).encode())},
    )
    source = JsonLines(tmp_path)
    assert source.languages == ("en", "de")
    assert list(source.parallel(DE_EN, "train")) == [("A", "a"), ("B", "b")]
    assert list(source.parallel(EN_DE, "valid")) == [("c", "C")]
    folders = tmp_path / "many"
    write(folders, **{"en-de/train__json": rows(("a", "A"))})
    write(
        folders, **{"en-yo/train__json": json.dumps({"translation": {"yo": "Y", "en": "y"}}), "en-yo/readme__txt": ""}
    )
    assert {str(d) for d in JsonLines(folders).directions} == {"en-de", "de-en", "en-yo", "yo-en"}
    assert len(JsonLines(tmp_path / "train.jsonl").parallel(EN_DE, "train")) == 2


def test_jsonl_keeps_a_sentence_on_one_line(tmp_path):
    write(tmp_path, train__jsonl=rows(("two\nlines\r\nhere\u2028", "x")))
    assert JsonLines(tmp_path).parallel(EN_DE, "train")[0][0] == "two lines  here"


def test_jsonl_counts_empty_lines_and_texts(tmp_path):
    write(tmp_path, train__jsonl="\n" + rows(("a", "A"), ("", "B")) + "\n" + rows(("c", "C")))
    with pytest.warns(UserWarning, match=r"line 1 \(3 for en\); .*line 1 \(2 for de\)"):
        source = JsonLines(tmp_path)
    assert list(source.parallel(EN_DE, "train")) == [("a", "A"), ("c", "C")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            rows(("a", "A")) + '{"translation": {"en": "b", "de" "B"}}\n',
            r"train\.jsonl, line 2, column 34: the line",
        ),
        (rows(("a", "A")) + '{"translation": {"en": "b"}}\n', r"line 2: every line .*\(en, de\): missing de"),
        (rows(("a", "A")) + '{"translation": {"en": "b", "de": "B", "fr": ""}}', r"line 2: .*unknown fr"),
        ('{"translation": {"en": "b"}}\n', "line 1: at least two language codes are required, as en and de: got en"),
        ('{"translation": {"en": "b", "de": null}}\n', "line 1: the text of language 'de' must be a string: got None"),
        ('{"en": "b", "de": "B"}\n', 'line 1: .*the key "translation".*got the keys en, de'),
        ("3\n", "line 1: .*got int"),
        ("[\n", "line 1: the file must hold one JSON object a line: got the beginning of a JSON array"),
        (
            '{"translation": {"1": "b", "de": "B"}}\n',
            "line 1: at least two language codes are required, as en and de: got 1, de",
        ),
        ("\n\n", "must hold translations: got 2 empty lines"),
        ("[" * 5 + "\n", "JSON array"),
        ('{"a":' * 100_000 + "\n", "nested too deeply"),
        ("", "got an empty file"),
        (b'{"translation": {"en": "\xff"}}', r"line 1, byte 25 of the line: text must be UTF-8"),
    ],
)
def test_jsonl_names_what_is_wrong(tmp_path, content, message):
    write(tmp_path, train__jsonl=content)
    with pytest.raises(UserError, match=message):
        JsonLines(tmp_path)


def test_jsonl_says_what_it_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"named train\.jsonl, valid\.jsonl, .* in folders one below: found none"):
        JsonLines(tmp_path)
    write(tmp_path, train__json=rows(("a", "A")), train__jsonl=rows(("a", "A")))
    with pytest.raises(UserError, match=r"train\.json and train\.jsonl both hold train text"):
        JsonLines(tmp_path)


# -- tsv -------------------------------------------------------------------------------------------------------------


def test_tsv_reads_columns(tmp_path):
    write(tmp_path, train__tsv='en\tde\tpt-BR\r\na "b\tA\tx\r\nc\tC\t\r\n', valid__tsv="en\tde\nv\tV\n")
    with pytest.warns(UserWarning, match=r"train\.tsv, line 3 \(1 for pt_BR\)"):
        source = Tsv(tmp_path)
    assert source.languages == ("en", "de", "pt_BR")
    assert list(source.parallel(EN_DE, "train")) == [('a "b', "A"), ("c", "C")]
    assert list(source.parallel(Direction("pt_BR", "en"), "train")) == [("x", 'a "b')]
    assert list(source.parallel(EN_DE, "valid")) == [("v", "V")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("en\tde\na\tA\nb\n", r"train\.tsv, line 3: .*2 parted by tabs \(en, de\): got 1\. Missing: de"),
        ("en\tde\na\tA\tx\n", r"line 2: .*got 3\.$"),
        ("en;de\na;b\n", r"line 1: the header must be two or more language codes parted by tabs.*got 'en;de'"),
        ("en\tde\ten\na\tb\tc\n", "line 1: every language may stand there once: got en and en, "),
        ("en\tHello there\na\tb\n", r"line 1: the header must hold two or more language codes.*got 'en\\tHello there'"),
        ("en\tde\n", "at least one line after its header: got none"),
        ("", "got an empty file"),
        ("en\tde\n\tA\n\tB\n", r"line 2: a file must hold text in every language: got only empty lines for 'en'"),
    ],
)
def test_tsv_names_what_is_wrong(tmp_path, content, message):
    write(tmp_path, train__tsv=content)
    with pytest.raises(UserError, match=message):
        Tsv(tmp_path)


# -- text ------------------------------------------------------------------------------------------------------------


def test_text_reads_languages_and_holds_out(tmp_path):
    write(
        tmp_path,
        train__en="a\n\nb\na\n",
        valid__en="v\n",
        de__txt__gz=gzip.compress(b"".join(b"%d\n" % i for i in range(2000))),
    )
    source = Text(tmp_path, valid_share=0.1)
    assert source.languages == ("de", "en")
    assert source.directions == ()
    assert list(source.monolingual("en", "train")) == ["a", "b"]
    assert list(source.monolingual("en", "valid")) == ["v"]
    train, valid, test = (list(source.monolingual("de", split)) for split in ("train", "valid", "test"))
    assert len({*train, *valid, *test}) == len(train) + len(valid) + len(test) == 2000
    assert 120 < len(valid) < 280
    assert 5 < len(test) < 40
    assert list(Text(tmp_path, valid_share=0.1, test_share=0.05).monolingual("de", "valid")) == valid
    assert list(Text(tmp_path, valid_share=0.1, test_share=0).monolingual("de", "test")) == []
    with pytest.raises(UserError, match="monolingual text has no parallel pairs: got the direction en-de"):
        source.parallel(EN_DE, "train")


def test_paragraphs(tmp_path):
    write(tmp_path, en__txt="\n\none\ntwo\n\n \nthree\n")
    assert list(Text(tmp_path, unit="paragraph", valid_share=0).monolingual("en", "train")) == ["one two", "three"]
    assert Text(tmp_path).fingerprint() != Text(tmp_path, unit="paragraph").fingerprint()


def test_text_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"must be named train\.LANGUAGE.*found none among 0 files"):
        Text(tmp_path)
    write(tmp_path, en__txt="\n \n")
    with pytest.raises(UserError, match=r"en\.txt: a file must hold text: got 2 empty lines"):
        Text(tmp_path)
    write(tmp_path, en__txt="a\n", train__en="b\n")
    with pytest.raises(UserError, match=r"en\.txt and train\.en both hold train text of 'en'"):
        Text(tmp_path)
    with pytest.raises(UserError, match="unit must be line or paragraph: got 'word'"):
        Text(tmp_path, unit="word")
    with pytest.raises(UserError, match="valid_share must be"):
        Text(tmp_path, valid_share=1)
    with pytest.raises(UserError, match="test_share must be"):
        Text(tmp_path, test_share=0.6)


# -- real corpora ----------------------------------------------------------------------------------------------------


@real
def test_multi30k():
    source = Moses(REAL / "multi30k")
    assert set(source.languages) == {"en", "de", "fr", "cs"}
    assert len(source.directions) == 6
    for direction in source.directions:
        assert [len(source.parallel(direction, split)) for split in ("train", "valid", "test")] == [
            29_000,
            1_014,
            1_000,
        ]
        assert "en" in (direction.source, direction.target)
    assert source.parallel(EN_DE, "train")[0] == (
        "Two young, White males are outside near many bushes.",
        "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    )


@real
def test_multi30k_and_mafand_together():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source("union", f"moses:{REAL / 'multi30k'},jsonl:{REAL / 'mafand'}")
    assert len(source.languages) == 15
    assert len(source.directions) == 28
    assert len(source.parallel(Direction("en", "hau"), "train")) == 5_865
    assert len(source.parallel(Direction("wol", "fr"), "train")) == 3_360
    assert len(source.parallel(Direction("en", "pcm"), "test")) > 1_000
    assert len(source.monolingual("en", "train")) > 29_000 + 20_000
