"""The heads of all tasks under one name: each lies with its task in `moekit.tasks`."""

from moekit.tasks.causal_lm import CausalLMHead
from moekit.tasks.denoising import DenoisingHead
from moekit.tasks.head import Backbone, Head, HeadOutput, Prediction, Scores, States, TokenHead, predict
from moekit.tasks.masked_lm import MaskedLMHead
from moekit.tasks.replaced_token import ReplacedTokenHead
from moekit.tasks.sequence import SequenceHead
from moekit.tasks.span_corruption import SpanCorruptionHead
from moekit.tasks.translation import TranslationHead

__all__ = [
    "Backbone",
    "CausalLMHead",
    "DenoisingHead",
    "Head",
    "HeadOutput",
    "MaskedLMHead",
    "Prediction",
    "ReplacedTokenHead",
    "Scores",
    "SequenceHead",
    "SpanCorruptionHead",
    "States",
    "TokenHead",
    "TranslationHead",
    "predict",
]
