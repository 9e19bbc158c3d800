"""`Tokenizer` and `train_tokenizer`: one subword vocabulary for all languages.

Ids: pad 0, bos 1, eos 2, unk 3, then mask, the sentinels, one tag ``<2xx>`` per language, then bytes (if asked for)
and subwords. All but the last two are control symbols: no text ever encodes to them, and decoding drops them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from moekit.data.cache import CorruptCacheError, cached_folder, content_key
from moekit.data.keyed import permute
from moekit.data.text_stream import TextStream
from moekit.errors import UserError, nearest
from moekit.source import Source
from moekit.stored import parse_json

Model = Literal["unigram", "bpe"]
Normalization = Literal["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"]

NUM_SENTINELS = 32
_FORMAT = 1
_MASK = "<mask>"
_LONG = 1 << 22  # sentences
_CHARACTERS = 10_000_000
"""Most characters of the sample that a tokenizer is trained on; SentencePiece takes some 20 bytes for each."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How the tokenizer is trained; see `train_tokenizer`."""

    model: Model = "unigram"
    temperature: float = 5.0
    max_sentences: int = 100_000
    byte_fallback: bool = True
    character_coverage: float = 0.9995
    normalization: str = "nmt_nfkc"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning of their own; the defaults are those of `Tokenizer`.

    Attributes:
        pad: The id of padding.
        bos: The id that a target begins with (``decoder_start_token_id`` of transformers).
        eos: The id that a target ends with.
    """

    pad: int = 0
    bos: int = 1
    eos: int = 2


class Tokenizer:
    """A SentencePiece model that knows the project's special tokens and languages.

    Args:
        model: a serialized SentencePiece model made by `train_tokenizer`.
        languages: in the order of their ids.
    """

    pad_id = 0
    bos_id = 1
    eos_id = 2
    unk_id = 3
    mask_id = 4
    sentinel_ids = tuple(range(5, 5 + NUM_SENTINELS))
    first_tag_id = 5 + NUM_SENTINELS

    def __init__(self, model: bytes, languages: Sequence[str]) -> None:
        self._model = model
        self.languages = tuple(languages)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        wanted = ["<pad>", "<s>", "</s>", "<unk>", *_control_symbols(self.languages)]
        found = [self._processor.id_to_piece(i) for i in range(min(len(wanted), len(self._processor)))]
        if found != wanted:
            raise UserError(
                f"A tokenizer must begin with the special tokens of moekit for {', '.join(languages)}: got "
                f"{found[:6]}.... Use a model written by moekit.data.tokenizer.train_tokenizer."
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        return len(self._processor)

    @property
    def first_text_id(self) -> int:
        """Ids from here on are text; below are specials and language tags."""
        return self.first_tag_id + len(self.languages)

    def language_id(self, language: str) -> int:
        """Index of `language` in `languages`.

        Raises:
            UserError: if the tokenizer was trained without it.
        """
        if language not in self.languages:
            raise UserError(
                f"The tokenizer must know the language {language!r}. {nearest(language, self.languages)} Train it on "
                "data with that language."
            )
        return self.languages.index(language)

    def tag_id(self, language: str) -> int:
        """Token id of ``<2language>``."""
        return self.first_tag_id + self.language_id(language)

    def piece(self, id: int) -> str:
        """The piece of the vocabulary with this id, as SentencePiece writes it: U+2581 stands where a word begins."""
        return str(self._processor.id_to_piece(id))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """Ids of every text; encoded by so many threads."""
        return self._processor.encode(list(texts), num_threads=threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; specials and tags are dropped, an unknown piece reads as U+2047."""
        text = [int(i) for i in ids if i == self.unk_id or self.first_text_id <= i < self.vocab_size]
        return self._processor.decode(text).strip()

    @functools.cached_property
    def starts_word(self) -> NDArray[np.bool_]:
        """Bool[vocab_size]: True where a piece begins a word."""
        pieces = (self._processor.id_to_piece(i) for i in range(self.vocab_size))
        return np.fromiter((p.startswith("▁") for p in pieces), dtype=np.bool_, count=self.vocab_size)

    @functools.cached_property
    def continues_word(self) -> NDArray[np.bool_]:
        """Bool[vocab_size]: True where a piece goes on with a word: with a letter or digit, or what may be one."""

        def inside(id: int) -> bool:
            piece = self.piece(id)
            if id == self.unk_id or self._processor.is_byte(id):
                return True
            spelled = id >= self.first_text_id and not piece.startswith("▁")
            return spelled and any(unicodedata.category(character)[0] in "LMN" for character in piece)

        return np.fromiter(map(inside, range(self.vocab_size)), dtype=np.bool_, count=self.vocab_size)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the model and the languages."""
        return _digest(self._model, self.languages)

    def save(self, folder: Path | str) -> None:
        """Write ``tokenizer.model`` and ``tokenizer.json`` into `folder`; `replacing_folder` makes it whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = {
            "format": _FORMAT,
            "languages": list(self.languages),
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        (folder / "tokenizer.model").write_bytes(self._model)
        (folder / "tokenizer.json").write_bytes(json.dumps(header, indent=1).encode())

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            CorruptCacheError: if a file is missing or differs from what was written.
        """
        folder = Path(folder)
        try:
            header: dict[str, Any] = parse_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
            if header["format"] != _FORMAT:
                raise CorruptCacheError(f"{folder}/tokenizer.json must have format {_FORMAT}: got {header['format']}.")
            model, languages = (folder / "tokenizer.model").read_bytes(), [str(code) for code in header["languages"]]
            if _digest(model, languages) != header["fingerprint"]:  # before sentencepiece, which trusts what it parses
                raise CorruptCacheError(
                    f"{folder}/tokenizer.model must be as it was written: its checksum differs from tokenizer.json."
                )
            return cls(model, languages)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptCacheError(
                f"The tokenizer folder {folder} must hold tokenizer.model and tokenizer.json: {error.filename} is "
                "missing."
            ) from error
        except CorruptCacheError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CorruptCacheError(
                f"The tokenizer in {folder} must be as it was written: it cannot be read ({error})."
            ) from error

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, tuple[str, ...]]]:
        return (Tokenizer, (self._model, self.languages))

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, languages={','.join(self.languages)})"


def _digest(model: bytes, languages: Sequence[str]) -> str:
    return hashlib.sha256(model + json.dumps(languages).encode()).hexdigest()


def _control_symbols(languages: Sequence[str]) -> list[str]:
    return [_MASK, *(f"<extra_{i}>" for i in range(NUM_SENTINELS)), *(f"<2{lang}>" for lang in languages)]


def train_tokenizer(
    source: Source,
    *,
    vocab_size: int,
    cache_dir: Path | str,
    model: Model = "unigram",
    temperature: float = 5.0,
    max_sentences: int = 100_000,
    byte_fallback: bool = True,
    character_coverage: float = 0.9995,
    normalization: str = "nmt_nfkc",
    seed: int = 0,
) -> Tokenizer:
    """Train a tokenizer on `source`, or take it from the cache if it was trained before.

    Language l gives a share p_l^(1/temperature) of the training sentences, where p_l is its share of all sentences;
    where that is more than it has, its sentences repeat.

    Args:
        source: its ``monolingual(language, "train")`` is the training text.
        vocab_size: number of ids, specials, tags and bytes included.
        cache_dir: where tokenizers are kept; several processes may ask at once.
        model: SentencePiece's algorithm.
        temperature: 1 = languages by size, large = all equal.
        max_sentences: at most so many sentences are read by the trainer, and at most ten million characters: of longer
            ones fewer.
        byte_fallback: spell unknown characters in bytes (costs 256 ids) instead of making them unk.
        character_coverage: share of character occurrences that must have a piece of their own, from 0.98 to 1.
        normalization: SentencePiece's rule name, for example ``nmt_nfkc`` or ``identity``.
        seed: of the choice of sentences.

    Raises:
        UserError: if the corpus cannot fill (or does not fit) `vocab_size`, if there is no such rule or coverage, or
            the cache cannot be written.

    Source: arXiv:1808.06226 (SentencePiece); arXiv:1907.05019 section 3 (temperature sampling).
    """
    if not 0.98 <= character_coverage <= 1:
        raise UserError(f"data.character_coverage must be a share from 0.98 to 1: got {character_coverage}.")
    if normalization not in get_args(Normalization):
        raise UserError(
            f"data.normalization_rule_name must be one of {', '.join(get_args(Normalization))}: got {normalization!r}."
        )
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "model_type": model,
        "byte_fallback": byte_fallback,
        "character_coverage": character_coverage,
    }
    choice = {"temperature": temperature, "max_sentences": max_sentences, "seed": seed}
    key = content_key(
        kind="tokenizer",
        format=_FORMAT,
        source=source.fingerprint(),
        normalization=normalization,
        **choice,
        **options,
    )

    def build(folder: Path) -> None:
        sentences = _training_sentences(source, temperature, max_sentences, seed)
        trained = _train(sentences, source.languages, normalization_rule_name=normalization, **options)
        Tokenizer(trained, source.languages).save(folder)

    return cached_folder(Path(cache_dir) / "tokenizers" / key, build, Tokenizer.load)


def _training_sentences(source: Source, temperature: float, max_sentences: int, seed: int) -> list[str]:
    texts = [source.monolingual(language, "train") for language in source.languages]
    sizes = np.array([len(t) for t in texts], dtype=np.float64)
    if sizes.sum() == 0:
        raise UserError(
            f"Training a tokenizer needs text: the source {source.name!r} has no training sentence in any of "
            f"{', '.join(source.languages)}."
        )
    shares = np.where(sizes > 0, (sizes / sizes.sum()) ** (1 / temperature), 0.0)
    wanted = np.maximum(1, np.round(min(max_sentences, sizes.sum()) * shares / shares.sum())).astype(int)
    rng = np.random.default_rng([seed, 0x70C])
    chosen: list[str] = []
    for text, count in zip(texts, wanted, strict=True):
        if len(text):
            whole, rest = divmod(int(count), len(text))
            drawn = _drawn(len(text), rest, rng)
            for _ in range(whole):
                chosen.extend(_spread(text, _CHARACTERS))
            chosen.extend(_spread(_picked(text, drawn), _CHARACTERS))
    return _spread(chosen, _CHARACTERS)


def _drawn(size: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Int64[count] of `size` numbers, in order, each once."""
    if size <= _LONG:
        return np.sort(rng.permutation(size)[:count])
    own = rng.integers(2**63, size=1, dtype=np.uint64)  # a permutation would take 8 bytes for each sentence
    return np.sort(permute(np.arange(count), size, own))


def _picked(text: Sequence[str], numbers: NDArray[np.int64]) -> Iterator[str]:
    """The sentences with these numbers, which rise; the text is walked through once."""
    if not isinstance(text, TextStream):
        return (text[int(i)] for i in numbers)
    steps = np.diff(numbers, prepend=-1) - 1
    sentences = iter(text)
    return (next(itertools.islice(sentences, int(step), None)) for step in steps)


def _spread(sentences: Iterable[str], most: int) -> list[str]:
    """All of the sentences; where they have more than `most` characters every second, or every fourth and so on."""
    kept: list[str] = []
    size, stride = 0, 1
    for number, sentence in enumerate(sentences):
        if number % stride:
            continue
        kept.append(sentence)
        size += len(sentence)
        while size > most and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            size = sum(map(len, kept))
    return kept


def _train(sentences: list[str], languages: Sequence[str], *, vocab_size: int, **options: Any) -> bytes:
    out = io.BytesIO()
    specials = 4 + len(_control_symbols(languages)) + 256 * bool(options["byte_fallback"])
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=out,
            vocab_size=vocab_size,
            control_symbols=_control_symbols(languages),
            pad_id=Tokenizer.pad_id,
            bos_id=Tokenizer.bos_id,
            eos_id=Tokenizer.eos_id,
            unk_id=Tokenizer.unk_id,
            max_sentence_length=1 << 16,
            num_threads=1,  # more would make the sums, and so the vocabulary, depend on the machine
            minloglevel=3,
            **options,
        )
    except RuntimeError as error:
        raise _too_large_or_small(error, vocab_size, specials, len(sentences)) from error
    return out.getvalue()


def _too_large_or_small(error: RuntimeError, vocab_size: int, specials: int, sentences: int) -> Exception:
    message = str(error)
    if found := re.search(r"too high.*?<= (\d+)", message):
        return UserError(
            f"data.vocab_size must be at most {found[1]} for this corpus of {sentences:,} sentences: got {vocab_size}. "
            f"Set data.vocab_size to {found[1]} or less, or give more text."
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return UserError(
            f"data.vocab_size must be at least {int(found[1]) + 1} for this corpus, whose characters and {specials} "
            f"special tokens need that many: got {vocab_size}. Raise data.vocab_size, or lower data.character_coverage."
        )
    if vocab_size <= specials:
        return UserError(
            f"data.vocab_size must be larger than the {specials} special tokens: got {vocab_size}. Raise it."
        )
    return UserError(
        f"The tokenizer could not be trained on {sentences:,} sentences with data.vocab_size {vocab_size}: {message}"
    )
