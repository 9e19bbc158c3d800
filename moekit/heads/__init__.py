"""Multitask heads: each a task over a backbone, alone or beside others."""

from moekit.heads.base import Backbone, Head, HeadOutput, Prediction, Scores, TokenHead, predict
from moekit.heads.causal_lm import CausalLMHead
from moekit.heads.masked_lm import MaskedLMHead
from moekit.heads.replaced_token import ReplacedTokenHead
from moekit.heads.sequence import DenoisingHead, SequenceHead, SpanCorruptionHead, TranslationHead

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
    "TokenHead",
    "TranslationHead",
    "predict",
]
