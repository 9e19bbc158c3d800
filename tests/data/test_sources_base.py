"""Directions, names, the monolingual default, and the door to all kinds of source."""

import pytest

from moekit.data.sources import Babel, Direction, Source, Union, open_source
from moekit.errors import UserError, nearest
from moekit.source import all_directions, choose_directions, digest, language_code


class Phrasebook(Source):
    """Two phrases in three languages; German is never a target."""

    name = "phrasebook"
    languages = ("en", "de", "fr")
    directions = (Direction("en", "fr"), Direction("fr", "en"), Direction("de", "en"))

    def parallel(self, direction, split):
        self.check_direction(direction)
        if self.check_split(split) != "train":
            return []
        words = {"en": ["yes", "no", "yes"], "de": ["ja", "nein", "doch"], "fr": ["oui", "non", "si"]}
        return list(zip(words[direction.source], words[direction.target], strict=True))

    def fingerprint(self):
        return "phrasebook"


def test_direction_reads_what_it_writes():
    direction = Direction.parse("en-de")
    assert direction == Direction("en", "de")
    assert str(direction) == "en-de"
    assert direction.reverse == Direction("de", "en")
    assert Direction.parse(direction) is direction
    assert Direction.parse("en-sr@latin").target == "sr@latin"


@pytest.mark.parametrize("text", ["en", "en-", "-de", "en-de-fr", "en-en", "", "en-pt-BR"])
def test_wrong_directions(text):
    with pytest.raises(UserError, match="two different language codes with one hyphen"):
        Direction.parse(text)


def test_language_code():
    assert language_code(" pt-BR ") == "pt_BR"
    with pytest.raises(UserError, match=r"a\.tsv, line 1: a language code must begin with a letter.*got '2fr'"):
        language_code("2fr", "a.tsv, line 1")


def test_nearest_names_what_exists():
    assert nearest("mozes", ["moses", "tsv"]) == "Did you mean 'moses'? There are: moses, tsv."
    assert nearest("q", ["moses"]) == "There is: moses."
    assert nearest("q", []) == "There are: none."


def test_choosing_directions():
    everything = all_directions(("en", "de", "fr"))
    assert len(everything) == 6
    assert len(choose_directions(everything, pivot="en")) == 4
    assert choose_directions(everything, wanted=["fr-de", "fr-de"]) == (Direction("fr", "de"),)
    with pytest.raises(UserError, match=r"directions must be a list: got the text 'en-de'"):
        choose_directions(everything, wanted="en-de")
    with pytest.raises(UserError, match=r"got en-dr\. Did you mean 'en-"):
        choose_directions(everything, wanted=["en-dr"])
    with pytest.raises(UserError, match="at least one direction"):
        choose_directions([])


def test_monolingual_default_is_each_side_once():
    source = Phrasebook()
    assert source.monolingual("en", "train") == ["yes", "no"]
    assert source.monolingual("de", "train") == ["ja", "nein", "doch"]
    assert source.monolingual("fr", "test") == []


def test_wrong_names_of_a_source():
    source = Phrasebook()
    with pytest.raises(UserError, match=r"phrasebook: the direction.*got en-de\. Did you mean 'en-fr'\?|got en-de"):
        source.parallel(Direction("en", "de"), "train")
    with pytest.raises(UserError, match=r"got 'dee'\. Did you mean 'de'\? There are: de, en, fr\."):
        source.parallel(Direction("en", "dee"), "train")
    assert "3 directions" in repr(source)


def test_digest_keeps_parts_apart():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest(b"ab") == digest("ab")


def test_union_merges_languages_and_text():
    babel = Babel()
    source = Union([Phrasebook(), babel, Phrasebook()])
    assert source.languages == ("en", "de", "fr", "avl", "tnd", "kmb", "shl")
    assert source.directions[:3] == Phrasebook.directions
    assert len(source.directions) == 15
    pairs = source.parallel(Direction("en", "fr"), "train")
    assert list(pairs) == [("yes", "oui"), ("no", "non"), ("yes", "si")] * 2
    assert pairs[2:4] == [("yes", "si"), ("yes", "oui")]
    assert pairs[-1] == ("yes", "si")
    with pytest.raises(IndexError):
        pairs[6]
    assert source.monolingual("en", "train") == ["yes", "no"]
    assert source.monolingual("avl", "test")[3] == babel.monolingual("avl", "test")[3]
    assert len(source.parallel(Direction("en", "fr"), "valid")) == 0
    assert source.fingerprint() != Union([babel, Phrasebook()]).fingerprint()
    with pytest.raises(UserError, match=r"union: the language.*got 'em'\. Did you mean 'en'\?"):
        source.monolingual("em", "train")
    with pytest.raises(UserError, match="at least one source"):
        Union([])


def test_open_source_opens_babel_by_settings():
    source = open_source("babel", languages=3, seed=4)
    assert isinstance(source, Babel)
    assert source.languages == ("avl", "tnd", "kmb")


def test_open_source_opens_unions(tmp_path):
    (tmp_path / "en.txt").write_text("one\ntwo\n")
    source = open_source("union", f"babel:,text:{tmp_path}", babel={"languages": 2}, text={"valid_share": 0})
    assert source.languages == ("avl", "tnd", "en")
    assert list(source.monolingual("en", "train")) == ["one", "two"]


@pytest.mark.parametrize(
    ("kind", "path", "settings", "message"),
    [
        ("mozes", "x", {}, r"kind.*got 'mozes'\. Did you mean 'moses'\? There are: babel, examples, facts, gettext"),
        ("babel", "x", {}, "babel: the corpus is generated and has no path: got x"),
        ("babel", None, {"langauges": 3}, r"babel: settings.*got 'langauges'\. Did you mean 'languages'\?"),
        ("moses", None, {}, "moses: a path is required"),
        ("moses", "x", {"pivots": "en"}, r"moses: settings.*got 'pivots'\. Did you mean 'pivot'\?"),
        ("union", "moses", {}, "moses: a path is required"),
        ("union", None, {}, "union: the path must name the members as kind:path"),
        ("union", "babel:", {"moses": {}}, "union: settings must belong to a member: got 'moses'"),
        ("union", "babel:", {"babel": 3}, "union: the settings of babel must be a mapping: got int"),
        ("union", "babbel:", {}, "Did you mean 'babel'"),
    ],
)
def test_open_source_helps(kind, path, settings, message):
    with pytest.raises(UserError, match=message):
        open_source(kind, path, **settings)
