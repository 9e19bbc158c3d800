"""How the trained model is evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from moekit.runs.settings.fields import RESUME, setting


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the trained model is evaluated.

    Attributes:
        beam_size: number of hypotheses that the search keeps; 1 = greedy, 4 is usual in translation.
        length_penalty: exponent alpha of the length penalty ((5 + length) / 6) ** alpha; more prefers longer text, 0.6
            is usual.
        max_sentences: number of test sentences of each direction that are translated at most; 0 = all.
        valid_sentences: number of sentences of each direction or language that validation uses at most; 0 = all.
        batch_tokens: source tokens in a batch of evaluation; less needs less memory.
        samples: number of translations of each direction that are kept for the report.
    """

    beam_size: int = setting(4, at_least=1, free=RESUME)
    length_penalty: float = setting(0.6, free=RESUME)
    max_sentences: int = setting(0, at_least=0)
    valid_sentences: int = setting(100, at_least=0)
    batch_tokens: int = setting(4096, at_least=1)
    samples: int = setting(5, at_least=0, free=RESUME)
