"""References that a tokenizer cannot write, so that no model that writes with it can equal them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moekit.data.tokenizer import Tokenizer

_SHOWN = 3


def unwritable(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[int, list[str]]:
    """How many texts are others once they are tokenized and written again, and which characters go most often.

    Spaces do not count. NFKC for example makes one character of what is written in two ways, so that a wide question
    mark becomes a narrow one.
    """
    changed, gone = 0, Counter[str]()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        written = tokenizer.decode(ids)
        if text.split() != written.split():
            changed += 1
            gone += Counter("".join(text.split())) - Counter(written)
    return changed, [character for character, _ in gone.most_common(_SHOWN)]
