"""Where text comes from: the corpus, the mixture over its parts, and the batches of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from glob import glob
from pathlib import Path
from typing import Any, Literal

from moekit.babel.concepts import DEFAULT_CONCEPTS, MINIMUM_CONCEPTS
from moekit.data.mixture import TemperatureSchedule, heating
from moekit.data.salient import WithSalient
from moekit.data.sources import Source, Union, require_parameter, source_class
from moekit.data.sources.documents import Unit
from moekit.data.sources.names import LanguageNames, named_languages
from moekit.data.sources.union import open_part
from moekit.data.streams import TooLong
from moekit.data.tokenizer import Normalization
from moekit.environment import usable_cores
from moekit.errors import UserError
from moekit.runs.settings.fields import RESUME, SURGERY, setting
from moekit.runs.settings.train import TrainConfig

_WHICH_TEXT = (
    "source",
    "pivot",
    "directions",
    "languages",
    "columns",
    "max_languages",
    "babel_languages",
    "babel_sentences",
    "babel_sizes",
)
_WHICH_FACTS = (
    "facts_entities", "facts_relations", "facts_values", "facts_power", "facts_one_language", "facts_profiles",
)  # fmt: skip
_WHICH_WORDS = ("babel_concepts", "babel_cognates")
DOMAIN_SETTINGS = (*_WHICH_TEXT, *_WHICH_FACTS, *_WHICH_WORDS, "path", "unit", "text_field", "seed", "salient")
"""What says which text another domain is."""
_OF_ONE_SOURCE = ("path", "directions", "languages", "columns", "unit", "text_field")
"""What says nothing of a corpus of another kind."""
_MAX_WORKERS = 4  # beside each GPU
_OF_SOURCE = "source"  # the salient words are those that the corpus names


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes batches.

    Attributes:
        source: kind of corpus: babel (generated languages, nothing to download), facts (facts about entities told in
            these languages, with a known entropy), headlines (babel paragraphs and their headlines, a summarisation
            task; directions such as avl-avl), moses (parallel line files such as train.en
            and train.de, plain or gz), jsonl ({"translation": {"en": ..., "de": ...}} on each line), tsv (one column
            per language, with a header), examples ({"input": ..., "target": ...} on each line, or a TSV with these
            columns; directions such as en-en, the default), gettext (the software translation catalogs installed on
            this machine), text (one file per language), documents (many files of lines or of rows with text, in one
            language) or datasets (a folder of Hugging Face's datasets, in one language). Several kinds, given as
            moses,jsonl or as a list, are read as one corpus.
        path: folder or file of the corpus, or for documents a pattern such as corpus/**/*.txt.gz; for several kinds one
            path each, joined by commas or as a list. babel, facts, headlines and gettext need none.
        pivot: language that every direction must start or end with, where the text is parallel in more than two
            languages: a language code, "auto" (English if the corpus has it) or "none" (keep all pairs).
        directions: translation directions to train on, such as en-de,de-en or a list; not given = all. Of several kinds
            of data each takes those that it has.
        languages: languages to read, such as en,de or a list; not given = all whose names in the data look like
            language codes (en, eng, zh-CN, eng_Latn). Names that are none are mapped to codes: src=en,tgt=de or
            {src: en, tgt: de}.
        columns: languages of the columns of TSV files that have no header, in order, such as en,de,- or a list; a
            hyphen stands for a column that is not text. Not given = the first line of the files is the header.
        unit: what a sentence is in text of one language: a line, a paragraph (lines until an empty one) or a document
            (all lines of a row, for documents in .jsonl and for datasets).
        text_field: for documents and datasets: field of the rows that holds the text.
        max_languages: number of languages to read from gettext catalogs; those with the most text are taken.
        vocab_size: size of the SentencePiece vocabulary that is trained on the data, in pieces: 1,000 to 4,000 for
            small models, 32,000 for large ones.
        character_coverage: share of the characters of the text that the vocabulary must hold, from 0.98 to 1: 0.9995
            for scripts with many characters such as Chinese, 1 for small alphabets; rarer characters are spelled in
            bytes.
        byte_fallback: whether characters that are not in the vocabulary are spelled in bytes, for which 256 pieces are
            set aside; otherwise they become the unknown token.
        normalization_rule_name: SentencePiece's rule for normalizing text before it is tokenized: nmt_nfkc, nfkc,
            nmt_nfkc_cf or nfkc_cf (case-folded), or identity (none).
        tokenizer: folder of an existing tokenizer to use instead of training one; it must know all languages of the
            data.
        sentinel: whether, in tasks on text pairs such as translation, the first sentinel token ends the source and
            begins the target, as in span corruption; useful when fine-tuning a T5-like model.
        mask_shares: for masked LM: shares of the chosen tokens that are replaced by the mask, replaced by a random
            token, and left unchanged; 0.8, 0.1, 0.1 in BERT.
        span_ratio: for span corruption: share of the tokens that are masked; 0.15 in T5.
        mean_span: for span corruption: mean length of a masked span, in tokens; 3 in T5.
        packed: for span corruption: whether sentences are concatenated and cut into chunks that fill `max_length`
            positions once corrupted, as in T5. Otherwise each sentence is corrupted on its own, and a short one loses
            only one or two tokens.
        salient: for span corruption: words that carry knowledge, which are cut out whole, each as a span of its own,
            instead of random spans: source = those that the corpus names (of facts the values), or a file with one word
            a line, written as the text writes it; not given = random spans. Texts without any have random spans.
        salient_share: for span corruption: share of the salient words of a text that are cut out, at least one; 1 = all
            of them.
        temperature: sampling temperature T over directions and languages, p ~ n ** (1 / T): 1 samples in proportion to
            size, 5 is usual for very unequal sizes.
        heating: shape of the rise of the sampling temperature: linear, square_root or step (a single jump).
        heating_steps: optimizer steps over which the sampling temperature rises from 1 to `temperature`; 0 = constant
            temperature.
        max_length: maximum length of a training sequence, in pieces including special tokens; see `too_long` for what
            happens to longer sentences. 128 is enough for single sentences.
        too_long: what happens to training sentences longer than `max_length`: drop, truncate or error (stop before
            training). Pairs of which one side is longer count as longer; evaluation always truncates.
        cache: folder of tokenizers and tokenized text, shared by all runs.
        num_workers: number of data loader processes for each training process; 0 = load in the training process itself;
            auto = none on a CPU, up to four beside each GPU.
        babel_languages: number of languages to generate, for babel, facts and headlines.
        babel_sentences: number of training sentences to generate in each language of babel or facts; for headlines, of
            paragraphs.
        babel_sizes: numbers of training sentences of individual babel languages, to make some low-resource:
            kmb=2000,shl=500 or {kmb: 2000, shl: 500}.
        babel_concepts: number of things that can be talked about in babel and headlines, each of which is a word in
            every language; their frequencies fall with the rank in their word class, as 1 / (rank + 1).
        babel_cognates: share of the words of babel and headlines that sound alike in all languages; names always do.
            With 0 every other word must be learnt for each pair of languages.
        facts_entities: number of entities of the facts corpus, of whom something is told.
        facts_relations: number of relations of an entity to a value in the facts corpus; each entity has one value in
            each of them, and is linked to one other entity.
        facts_values: number of values of each relation of the facts corpus; a fact holds ln(values) nats.
        facts_power: exponent of the power law by which the frequencies of entities fall; 0 = all are as frequent.
        facts_one_language: share of the facts that are told in one language only.
        facts_profiles: share of the sentences of the facts corpus that are profiles, an entity and six of its facts in
            a row; the rest tell one fact, or two.
        seed: random seed of the babel corpus and of the order of examples.
        order_seed: random seed of the order of examples and of the noise in them; not given = `seed`.

    Raises:
        UserError: sizes that are none.
    """

    source: str | tuple[str, ...] = "babel"
    path: str | tuple[str, ...] | None = setting(None, free=RESUME)
    pivot: str = "auto"
    directions: tuple[str, ...] | str | None = None
    languages: tuple[str, ...] | dict[str, str] | str | None = None
    columns: tuple[str, ...] | str | None = None
    unit: Unit = "line"
    text_field: str = "text"
    max_languages: int = setting(10, at_least=1)
    vocab_size: int = setting(1024, at_least=1)
    character_coverage: float = setting(0.9995, at_least=0.98)
    byte_fallback: bool = True
    normalization_rule_name: Normalization = "nmt_nfkc"
    tokenizer: str | None = setting(None, free=RESUME)
    sentinel: bool = False
    mask_shares: tuple[float, float, float] = setting((0.8, 0.1, 0.1), at_least=0, at_most=1, free=SURGERY)
    span_ratio: float = setting(0.15, above=0, below=1, free=SURGERY)
    mean_span: float = setting(3.0, at_least=1, free=SURGERY)
    packed: bool = setting(False, free=SURGERY)
    salient: str | None = setting(None, free=RESUME + SURGERY)
    salient_share: float = setting(1.0, above=0, at_most=1, free=SURGERY)
    temperature: float = setting(1.0, above=0, free=SURGERY)
    heating: Literal["linear", "square_root", "step"] = setting("linear", free=SURGERY)
    heating_steps: int = setting(0, at_least=0, free=SURGERY)
    max_length: int = setting(128, at_least=3, free=SURGERY)
    too_long: TooLong = setting("drop", free=SURGERY)
    cache: str = setting(".cache/moekit", free=RESUME + SURGERY)
    num_workers: int | Literal["auto"] = setting("auto", at_least=0, at_most=128, free=RESUME + SURGERY)
    babel_languages: int = setting(4, at_least=1)
    babel_sentences: int = setting(30_000, at_least=1)
    babel_sizes: dict[str, int] | str | None = setting(None, at_least=1)
    babel_concepts: int = setting(DEFAULT_CONCEPTS, at_least=MINIMUM_CONCEPTS)
    babel_cognates: float = setting(0.15, at_least=0, at_most=1)
    facts_entities: int = setting(2_000, at_least=4)
    facts_relations: int = setting(4, at_least=1)
    facts_values: int = setting(64, at_least=2)
    facts_power: float = setting(0.7, at_least=0)
    facts_one_language: float = setting(0.1, at_least=0, below=1)
    facts_profiles: float = setting(0.0, at_least=0, at_most=1)
    seed: int = setting(1, at_least=0, at_most=2**32 - 1)
    order_seed: int | None = setting(None, at_least=0, at_most=2**32 - 1, free=SURGERY)

    def __post_init__(self) -> None:
        structured = {
            "source": _word_or_list(self.source),
            "path": _paths(self.path),
            "directions": _listed(self.directions) or None,
            "languages": named_languages(self.languages),
            "columns": _listed(self.columns) or None,
            "babel_sizes": (self.babel_sizes and _sizes(self.babel_sizes)) or None,
        }
        for name, value in structured.items():
            object.__setattr__(self, name, value)

    @property
    def sources(self) -> tuple[str, ...]:
        """The kinds of data."""
        return _listed(self.source)

    def open(self) -> Source:
        """The corpus that the settings describe.

        Raises:
            UserError: wrong number of paths, an unknown kind, or whatever is wrong with the data.
        """
        kinds, paths = self.sources, _listed(self.path)
        if not kinds:
            raise UserError("data.source must name at least one kind of data, such as babel or moses: got nothing.")
        classes = [source_class(kind) for kind in kinds]
        needed = sum(made.needs_path() for made in classes)
        if len(paths) not in (needed, len(kinds)):
            folders = {0: "no folder", 1: "one folder"}.get(needed, f"{needed} folders, joined by commas,")
            raise UserError(
                f"data.path must give {folders} for data.source {','.join(kinds)}: got "
                f"{len(paths)}. For example --data.source moses --data.path my/corpus."
            )
        remaining, everything = iter(paths), len(paths) == len(kinds)
        for name in ("languages", "columns", "unit", "text_field"):
            if getattr(self, name) != _DEFAULTS[name]:
                require_parameter(kinds, name)
        opened = [self._open(made, next(remaining) if everything or made.needs_path() else None) for made in classes]
        found = opened[0] if len(opened) == 1 else Union(opened, self.directions)
        LanguageNames(self.languages).check(found)
        return found if self.salient in (None, _OF_SOURCE) else WithSalient.read(found, self.salient)

    def _open(self, made: type[Source], path: str | None) -> Source:
        """One of the kinds of data; of several, with the directions that it has."""
        given = {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "pivot": None if self.pivot == "none" else self.pivot,
            "babel_sizes": self.babel_sizes or {},
        }
        return open_part(made, path, given, alone=len(self.sources) < 2)

    def of_domain(self, given: Mapping[str, Any]) -> DataConfig:
        """These settings for other text: with those of `DOMAIN_SETTINGS` that are given, read by this process."""
        others = {name: _DEFAULTS[name] for name in _OF_ONE_SOURCE} if "source" in given else {}
        return replace(self, **{**others, "num_workers": 0, **given})

    def glossary(self) -> Source | None:
        """The first of the sources that can say its sentences in English, with nothing read; None if none can."""
        return self._generated([kind for kind in self.sources if source_class(kind).knows_words])

    def knowledge(self) -> Source | None:
        """The first of the sources that knows the facts of its text, with nothing read; None if none does."""
        kinds = [kind for kind in self.sources if source_class(kind).knows_facts]
        return self._open(source_class(kinds[0]), None) if kinds else None

    def dictionary(self) -> Source | None:
        """The first of the sources that knows what its sentences mean, with nothing read; None if none does."""
        return self._generated([kind for kind in self.sources if source_class(kind).knows_meanings])

    def grammar(self) -> Source | None:
        """The first of the sources that knows the grammar of its languages, with nothing read; None if none does."""
        return self._generated([kind for kind in self.sources if source_class(kind).knows_agreement])

    def _generated(self, kinds: list[str]) -> Source | None:
        """The first of some kinds of data, with all its directions and nothing read; None if there is none."""
        if not kinds:
            return None
        return replace(self, source=kinds[0], path=None, directions=None, **_OF_FILES).open()

    def missing_paths(self) -> list[str]:
        """Those of the paths where nothing is."""
        return [path for path in _listed(self.path) if not Path(path).exists() and not glob(path, recursive=True)]

    def which_text(self) -> dict[str, Any]:
        """The settings that say which text is read; where it lies does not matter."""
        generated = any("path" not in source_class(kind).parameters() for kind in self.sources)
        more = [*(_WHICH_FACTS if "facts" in self.sources else ()), *(["seed"] if generated else [])]
        more += [
            name for name in ("unit", "text_field", "salient", *_WHICH_WORDS) if getattr(self, name) != _DEFAULTS[name]
        ]
        return {f"data.{name}": getattr(self, name) for name in (*_WHICH_TEXT, *more)}

    def temperature_schedule(self, batches: int = 1) -> TemperatureSchedule:
        """The temperature of the mixture over directions and languages by batch, with so many in an optimizer step."""
        return heating(self.heating, self.temperature, self.heating_steps * batches)

    def workers(self, train: TrainConfig) -> int:
        """How many processes prepare batches for each that trains, "auto" resolved for this machine."""
        if self.num_workers != "auto":
            return self.num_workers
        if not train.on_gpu:
            return 0
        return max(0, min(_MAX_WORKERS, usable_cores() // max(train.devices, 1) - 1))


def _listed(given: tuple[str, ...] | list[str] | str | None) -> tuple[str, ...]:
    """A list as it is; of text its parts between commas."""
    if isinstance(given, str):
        return tuple(part.strip() for part in given.split(",") if part.strip())
    if not isinstance(given, list | tuple | None):
        raise UserError(f"data.source, data.path and data.directions must be text or lists of it: got {given!r}.")
    return tuple(given or ())


def _word_or_list(given: tuple[str, ...] | list[str] | str | None) -> str | tuple[str, ...] | None:
    """A list of one as its word; None for an empty one."""
    found = _listed(given)
    return found if len(found) > 1 else next(iter(found), None)


def _paths(given: tuple[str, ...] | list[str] | str | None) -> str | tuple[str, ...] | None:
    """As `_word_or_list`; a path with a comma, which exists or is given as a list, stays a list: it is one."""
    found = (given,) if isinstance(given, str) and "," in given and Path(given).exists() else _listed(given)
    return found if any("," in path for path in found) else _word_or_list(found)


def _sizes(given: Mapping[str, int] | str | None) -> dict[str, int]:
    """Sizes by language, also from ``kmb=2000,shl=500``."""
    if not isinstance(given, str | Mapping | None):
        raise UserError(f"data.babel_sizes must be like kmb=2000,shl=500: got {given!r}.")
    if not isinstance(given, str):
        return dict(given or {})
    sizes = {}
    for part in _listed(given):
        code, _, size = part.partition("=")
        if not size.strip().isdecimal():
            raise UserError(f"data.babel_sizes must be like kmb=2000,shl=500: got {part!r}.")
        sizes[code.strip()] = int(size)
    return sizes


_DEFAULTS = {f.name: f.default for f in fields(DataConfig)}
_OF_FILES: dict[str, Any] = {
    name: _DEFAULTS[name] for name in ("languages", "columns", "unit", "text_field", "salient")
}
