"""Decoding (cached greedy search, beam search, sampling) and scoring of given texts, batched over sentences."""

from moekit.data.tokenizer import SpecialTokens
from moekit.inference.beam import BeamSearch
from moekit.inference.choices import ChoiceScorer, recall
from moekit.inference.generate import complete, generate
from moekit.inference.interface import CausalModel, Generation, Hypothesis, LengthLimit, Search, SequenceModel
from moekit.inference.length_penalty import GNMTPenalty, LengthPenalty, MeanLogProb
from moekit.inference.on_demand import ExpertsOnDemand, load_on_demand, open_on_demand
from moekit.inference.sampling import Greedy, Sampling
from moekit.inference.scoring import ContinuationScores, Question, Scorer, accuracy, few_shot, score_continuations
from moekit.inference.session import Session

__all__ = [
    "BeamSearch",
    "CausalModel",
    "ChoiceScorer",
    "ContinuationScores",
    "ExpertsOnDemand",
    "GNMTPenalty",
    "Generation",
    "Greedy",
    "Hypothesis",
    "LengthLimit",
    "LengthPenalty",
    "MeanLogProb",
    "Question",
    "Sampling",
    "Scorer",
    "Search",
    "SequenceModel",
    "Session",
    "SpecialTokens",
    "accuracy",
    "complete",
    "few_shot",
    "generate",
    "load_on_demand",
    "open_on_demand",
    "recall",
    "score_continuations",
]
