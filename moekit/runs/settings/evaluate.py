"""How the trained model is evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from moekit.runs.settings.fields import RESUME, setting


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the trained model is evaluated.

    Attributes:
        beam_size: number of hypotheses that beam search keeps; 1 = greedy search, 4 is usual in translation.
        length_penalty: exponent alpha of the length penalty ((5 + length) / 6) ** alpha; larger values favour longer
            output, 0.6 is usual.
        max_sentences: maximum number of test sentences per direction that are translated; 0 = all.
        valid_sentences: maximum number of validation sentences per direction or language; 0 = all. 100 keeps validation
            fast.
        batch_tokens: number of source tokens in an evaluation batch; lower it if memory runs out.
        samples: number of sample translations per direction that the report shows.
    """

    beam_size: int = setting(4, at_least=1, free=RESUME)
    length_penalty: float = setting(0.6, free=RESUME)
    max_sentences: int = setting(0, at_least=0)
    valid_sentences: int = setting(100, at_least=0)
    batch_tokens: int = setting(4096, at_least=1)
    samples: int = setting(5, at_least=0, free=RESUME)
