"""How the trained model is evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from moekit.runs.settings.fields import RESUME, setting


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the trained model is evaluated.

    Attributes:
        beam_size: of the search; 1 = greedy.
        length_penalty: alpha of ((5 + length) / 6) ** alpha.
        max_sentences: translate at most so many test sentences of each direction; 0 = all.
        valid_sentences: use at most so many sentences of each direction or language in validation; 0 = all.
        batch_tokens: source tokens in a batch.
        samples: translations kept for the report, of each direction.
    """

    beam_size: int = setting(4, at_least=1, free=RESUME)
    length_penalty: float = setting(0.6, free=RESUME)
    max_sentences: int = setting(0, at_least=0)
    valid_sentences: int = setting(100, at_least=0)
    batch_tokens: int = setting(4096, at_least=1)
    samples: int = setting(5, at_least=0, free=RESUME)
