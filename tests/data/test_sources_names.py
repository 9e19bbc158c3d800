"""Which names are languages, the names that published corpora have, and text that is not what it should be."""

import bz2
import gzip
import json
import lzma
import sys
import types

import pytest

from moekit.data.sources import Direction, Examples, JsonLines, Moses, Source, Text, Tsv
from moekit.data.sources.names import LanguageNames, looks_like_language
from moekit.errors import UserError

EN_DE = Direction("en", "de")


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def directions(source: Source) -> set[str]:
    return {str(direction) for direction in source.directions}


CODES = "en eng EN zh-CN zh_cn zh_Hans zh_Hant_TW eng_Latn pt-br es_419 sr@latin be-tarask ca@valencia kmb hau id"
NO_CODES = (
    "Go. Geh. Go talk_name src_prompt doc_id README LICENSE MIT ids bak xml txt src tgt e english en- -en en_ 2fr"
)


@pytest.mark.parametrize("name", CODES.split())
def test_language_codes(name):
    assert looks_like_language(name)


@pytest.mark.parametrize("name", [*NO_CODES.split(), "", "en de", "\u0435n"])
def test_names_that_are_no_language_codes(name):
    assert not looks_like_language(name)


def test_what_the_user_names_is_a_language():
    names = LanguageNames({"src": "en", "klingon": "tlh", "pt-BR": "pt-BR"})
    assert [names.code(name) for name in ("src", "klingon", "pt_BR", "en", "de")] == ["en", "tlh", "pt_BR", None, None]
    with pytest.raises(UserError, match="languages must be a list of at least one language code: got 'en'"):
        LanguageNames("en")
    with pytest.raises(UserError, match="languages must be a list of at least one"):
        LanguageNames([])


# -- text ------------------------------------------------------------------------------------------------------------

SPLITS = {"train.txt": "a\nb\n", "valid.txt": "c\n", "test.txt": "d\n"}


def test_splits_of_one_language(tmp_path):
    for folder, languages in ((tmp_path / "en", None), (tmp_path / "my-corpus", ["en"])):
        source = Text(write(folder, SPLITS), languages=languages)
        assert source.languages == ("en",)
        assert [list(source.monolingual("en", split)) for split in ("train", "valid", "test")] == [
            ["a", "b"],
            ["c"],
            ["d"],
        ]
    with pytest.raises(
        UserError, match=r"test\.txt: it must be known which.*my-corpus.*--data\.languages en.*test\.en"
    ):
        Text(tmp_path / "my-corpus")
    with pytest.raises(UserError, match=r"my-corpus, is not named after one of en, de"):
        Text(tmp_path / "my-corpus", languages=["en", "de"])


def test_text_leaves_out_what_is_no_language_and_says_so(tmp_path, caplog):
    more = {"README.txt": "x\n", "LICENSE.txt": "y\n", "train.ids": "1\n", "train.bak": "z\n", "train.xml": "<a>\n"}
    write(tmp_path, {"train.en": "a\n", "de.txt": "A\n", "dev.zh_Hans.txt": "V\n", "notes": "n", **more})
    source = Text(tmp_path, valid_share=0, test_share=0)
    assert source.languages == ("de", "zh_Hans", "en")
    assert list(source.monolingual("zh_Hans", "valid")) == ["V"]
    (line,) = caplog.messages
    assert line == (
        f"text: left out of {tmp_path}, as no text of a language: LICENSE.txt, README.txt, train.bak, train.ids, "
        "train.xml. --data.languages names those that are."
    )
    caplog.clear()
    assert Text(tmp_path, languages={"bak": "ba", "de": "de"}).languages == ("de", "ba")
    assert not caplog.messages


# -- tsv and jsonl ---------------------------------------------------------------------------------------------------


def test_tsv_leaves_out_columns_that_are_no_text(tmp_path, caplog):
    head = "talk_name\tid\tsrc_prompt\ten\tde\tfr\n"
    write(tmp_path, {"train.tsv": head + "talk\t1\tp\ta\tA\t__NULL__\ntalk\t2\tp\tb\t__NULL__\t__NULL__\n"})
    with pytest.warns(UserWarning, match=r"line 3 \(1 for de\)"):
        source = Tsv(tmp_path)
    assert source.languages == ("en", "de")
    assert list(source.parallel(EN_DE, "train")) == [("a", "A")]
    assert caplog.messages == [
        f"tsv: left out of {tmp_path}, as no text of a language: talk_name, src_prompt, id. --data.languages names "
        "those that are."
    ]


def test_tsv_without_a_header(tmp_path):
    write(tmp_path, {"train.tsv": "Go.\tGeh.\tCC-BY\nHi.\tHallo!\tCC-BY\n"})
    with pytest.raises(
        UserError, match=r"line 1: the header must hold two.*got 'Go\.\\tGeh\.\\tCC-BY'.*--data\.columns"
    ):
        Tsv(tmp_path)
    source = Tsv(tmp_path, columns=["en", "de", "-"])
    assert list(source.parallel(EN_DE, "train")) == [("Go.", "Geh."), ("Hi.", "Hallo!")]
    assert Tsv(tmp_path, columns=["english", "german", "-"]).languages == ("english", "german")
    with pytest.raises(UserError, match=r"line 1: every line must have as many fields as the header, 2 .*got 3"):
        Tsv(tmp_path, columns=["en", "de"])
    write(tmp_path, {"train.tsv": "en\tde\nGo.\tGeh.\n"})
    assert list(Tsv(tmp_path, columns=["en", "de"]).parallel(EN_DE, "train")) == [("Go.", "Geh.")]


@pytest.mark.parametrize("kind", [Tsv, JsonLines])
def test_files_of_other_pairs_are_left_out_where_languages_are_named(tmp_path, kind):
    """As a folder of many pairs is read for some of its languages; one file of another pair was an error."""

    def put(pair: str, split: str, heads: str, *lines: str) -> None:
        folder = tmp_path / pair
        folder.mkdir(exist_ok=True)
        codes = heads.split()
        rows = ["\t".join(codes), *("\t".join(line.split()) for line in lines)]
        if kind is JsonLines:
            rows = [json.dumps({"translation": dict(zip(codes, line.split(), strict=False))}) for line in lines]
        (folder / f"{split}.{kind.name}").write_text("\n".join(rows) + "\n")

    for split in ("train", "valid", "test"):
        put("en-hau", split, "en hau", "a A", "b B")
        put("en-ibo", split, "en ibo", "c C")
        put("fr-bam", split, "fr bam", "d D")
    source = kind(tmp_path, languages=["en", "hau"])
    assert directions(source) == {"en-hau", "hau-en"}
    assert list(source.parallel(Direction("en", "hau"), "train")) == [("a", "A"), ("b", "B")]
    assert set(source.monolingual("en", "train")) == {"a", "b"}
    assert directions(kind(tmp_path, languages=["en", "hau", "fr", "bam"])) == {"en-hau", "hau-en", "fr-bam", "bam-fr"}
    with pytest.raises(UserError, match=r"line 1: at least two language codes are required, of hau, bam: got en, hau"):
        kind(tmp_path, languages=["hau", "bam"])
    put("en-hau", "test", "en text", "a A")  # one with no languages is bad, not of other languages
    with pytest.raises(UserError, match=r"en-hau.test\.\w+, line 1: .* two .*language codes.*got '?en"):
        kind(tmp_path, languages=["en", "hau"])


def test_headings_and_keys_that_are_named(tmp_path):
    named = {"source": "en", "Deutsch": "de"}
    write(tmp_path, {"train.tsv": "source\tDeutsch\tfr\na\tA\tx\n"})
    assert directions(Tsv(tmp_path, languages=named)) == {"en-de", "de-en"}
    row = json.dumps({"translation": {"source": "a", "Deutsch": "A", "id": 7}})
    write(tmp_path, {"train.jsonl": row})
    assert list(JsonLines(tmp_path, languages=named).parallel(EN_DE, "train")) == [("a", "A")]
    with pytest.raises(UserError, match=r"line 1: at least two.*got source, Deutsch, id\. .*--data\.languages src=en"):
        JsonLines(tmp_path)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (
            JsonLines,
            '{"translation": {"en": "a", "zh-CN": "b", "zh_CN": "c"}}',
            "line 1: .* got zh-CN and zh_CN, which",
        ),
        (Tsv, "en\tzh-CN\tzh_CN\na\tb\tc\n", "line 1: .* got zh-CN and zh_CN, which"),
        (JsonLines, '{"translation": {"en": "a\\ud800", "de": "b"}}', r"line 1: text must be whole.* \\ud800"),
        (Examples, '{"input": "a\\ud800", "target": "b"}', r"line 1: text must be whole.* \\ud800"),
        (JsonLines, '{"translation": {"en": "a\\u0000b", "de": "b"}}', "line 1: text must be without NUL"),
        (Examples, '{"input": "a", "target": "\\\\\\u0000"}', "line 1: text must be without NUL"),
        (JsonLines, '{"a": ' * 10**6, "line 1: .*nested too deeply"),
        (Examples, "[" * 10**6, "line 1: .*nested too deeply"),
        (JsonLines, '{"n": ' + "9" * 5000 + "}", "line 1: .*must be JSON: .*digits"),
        (Examples, '{"n": ' + "9" * 5000 + "}", "line 1: .*must be JSON: .*digits"),
    ],
)
def test_lines_that_cannot_be_meant(tmp_path, kind, content, message):
    name = "train.tsv" if kind is Tsv else "train.jsonl"
    write(tmp_path, {name: content})
    with pytest.raises(UserError, match=rf"{name}, {message}"):
        kind(tmp_path)


def test_whole_surrogate_pairs_are_characters(tmp_path):
    write(tmp_path, {"train.jsonl": '{"translation": {"en": "\\ud83d\\ude00 a", "de": "\\\\ud800"}}'})
    assert list(JsonLines(tmp_path).parallel(EN_DE, "train")) == [("\U0001f600 a", "\\ud800")]


def test_a_backslash_before_u0000_is_a_backslash(tmp_path):
    write(tmp_path, {"train.jsonl": '{"translation": {"en": "\\\\u0000 a", "de": "b"}}'})
    assert list(JsonLines(tmp_path).parallel(EN_DE, "train")) == [("\\u0000 a", "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\n".encode("utf-16"), "line 1: text must be UTF-8: it begins as UTF-16 does.*iconv -f utf-16"),
        ("en\tde\n".encode("utf-16-be"), "line 1: text must be UTF-8: it begins as UTF-16 does"),
        ("en\tde\n".encode("utf-32"), "line 1: text must be UTF-8: it begins as UTF-32 does"),
        (b"\xef\xbb\xbf", "a file must hold at least one line: got an empty file"),
        (b"good\nen\0glish\n", "line 2, byte 3 of the line: text must be without NUL"),
        (b"good\n\xff\n", "line 2, byte 1 of the line: text must be UTF-8: got the byte 0xff"),
    ],
)
@pytest.mark.parametrize(("kind", "name"), [(Text, "train.en"), (Tsv, "train.tsv"), (JsonLines, "train.jsonl")])
def test_files_that_are_no_text(tmp_path, content, message, kind, name):
    write(tmp_path, {name: content})
    with pytest.raises(UserError, match=rf"{name}(, |: ){message}"):
        kind(tmp_path)


# -- the names of published corpora ----------------------------------------------------------------------------------


def test_opus_names(tmp_path, caplog):
    names = [f"opus.en-de-{split}.{language}" for split in ("train", "dev", "test") for language in ("en", "de")]
    source = Moses(write(tmp_path / "opus-100", {name: f"{name}\n" for name in names}))
    for split, name in (("train", "train"), ("valid", "dev"), ("test", "test")):
        assert list(source.parallel(EN_DE, split)) == [(f"opus.en-de-{name}.en", f"opus.en-de-{name}.de")]
    assert not caplog.messages
    files = {"Europarl.de-en.de": "A\n", "Europarl.de-en.en": "a\n", "Europarl.de-en.xml": "<x>\n"}
    files |= {"GNOME.de-en.de": "B\n", "GNOME.de-en.en": "b\n", "Europarl.de-en.ids": "1\n", "README": "r\n"}
    source = Moses(write(tmp_path / "two", files))
    assert list(source.parallel(EN_DE, "train")) == [("a", "A"), ("b", "B")]
    assert "Europarl.de-en.ids, Europarl.de-en.xml." in caplog.text
    many = {"en-de/opus.en-de-train.en": "a\n", "en-de/opus.en-de-train.de": "A\n"}
    many |= {"en-fr/opus.en-fr-train.en": "a\n", "en-fr/opus.en-fr-train.fr": "A\n"}
    assert directions(Moses(write(tmp_path / "many", many))) == {"en-de", "de-en", "en-fr", "fr-en"}
    chosen = Moses(tmp_path / "many", languages=["en", "fr"])
    assert directions(chosen) == {"en-fr", "fr-en"}
    assert list(chosen.monolingual("en", "train")) == ["a"]


def test_flores_names(tmp_path):
    codes = ["eng_Latn", "deu_Latn", "zho_Hans"]
    files = {f"{split}/{code}.{split}": f"{code} {split}\n" for split in ("dev", "devtest") for code in codes}
    source = Moses(write(tmp_path, files))
    direction = Direction("eng_Latn", "deu_Latn")
    assert list(source.parallel(direction, "valid")) == [("eng_Latn dev", "deu_Latn dev")]
    assert list(source.parallel(direction, "test")) == [("eng_Latn devtest", "deu_Latn devtest")]
    assert len(source.directions) == 4, "English is the pivot"
    assert Moses(tmp_path, languages={"eng_Latn": "en", "deu_Latn": "de"}).languages == ("de", "en")
    assert list(Moses(tmp_path / "dev").parallel(direction, "valid")) == [("eng_Latn dev", "deu_Latn dev")]


def test_wmt_and_opennmt_names(tmp_path):
    files = {
        f"{side}-{split}.txt": f"{side} {split}\n" for side in ("src", "tgt") for split in ("train", "val", "test")
    }
    write(tmp_path, files)
    source = Moses(tmp_path, languages={"src": "en", "tgt": "de"})
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        assert list(source.parallel(EN_DE, split)) == [(f"src {name}", f"tgt {name}")]
    with pytest.raises(UserError, match=r"found none among 6 files.*--data\.languages src=en,tgt=de"):
        Moses(tmp_path)
    files = {f"{name}.{code}": f"{code}\n" for name in ("newstest2014", "newsdev2013") for code in ("en", "de")}
    files |= {f"train.{code}.txt": f"{code}\n" for code in ("en", "de")}
    source = Moses(write(tmp_path / "wmt", files))
    assert [len(source.parallel(EN_DE, split)) for split in ("train", "valid", "test")] == [1, 1, 1]


def test_other_names_are_not_read_beside_the_usual_ones(tmp_path):
    files = {"train.en": "a\n", "train.de": "A\n", "Europarl.de-en.en": "b\n", "Europarl.de-en.de": "B\n"}
    assert list(Moses(write(tmp_path, files)).parallel(EN_DE, "train")) == [("a", "A")]


# -- compression -----------------------------------------------------------------------------------------------------


def test_compressed_files(tmp_path):
    packed = {
        "train.en.xz": lzma.compress(b"a\n"),
        "train.de.bz2": bz2.compress(b"A\n"),
        "train.fr.gz": gzip.compress(b"f\n"),
    }
    source = Moses(write(tmp_path, packed))
    assert list(source.parallel(EN_DE, "train")) == [("a", "A")]
    for name in packed:
        write(tmp_path / "cut" / name, {name: packed[name][:-3]})
        with pytest.raises(UserError, match=rf"{name}: a file named \.\w+ must be a whole \w+ archive"):
            Text(tmp_path / "cut" / name)


def test_zst_where_it_can_be_read(tmp_path, monkeypatch):
    write(tmp_path, {"train.en.zst": b"packed", "train.de": "A\n"})
    if sys.version_info < (3, 14):
        monkeypatch.setitem(sys.modules, "backports.zstd", None)
        with pytest.raises(
            UserError, match=r"train\.en\.zst: a file named \.zst needs Python 3\.14 or the package backports\.zstd"
        ):
            Moses(tmp_path)
    parent, module = types.ModuleType("compression"), types.ModuleType("compression.zstd")
    module.decompress = {b"packed": b"a\n"}.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compression", parent)
    monkeypatch.setitem(sys.modules, "compression.zstd", module)
    assert list(Moses(tmp_path).parallel(EN_DE, "train")) == [("a", "A")]
