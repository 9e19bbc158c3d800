"""Decoding: cached greedy search, beam search and sampling, batched over sentences."""

from moekit.inference.beam import BeamSearch
from moekit.inference.generate import complete, generate
from moekit.inference.interface import (
    CausalModel,
    Generation,
    LengthLimit,
    Search,
    SequenceModel,
    SpecialTokens,
)
from moekit.inference.length_penalty import GNMTPenalty, LengthPenalty, MeanLogProb
from moekit.inference.on_demand import ExpertsOnDemand, load_on_demand, open_on_demand
from moekit.inference.sampling import Greedy, Sampling
from moekit.inference.session import Session

__all__ = [
    "BeamSearch",
    "CausalModel",
    "ExpertsOnDemand",
    "GNMTPenalty",
    "Generation",
    "Greedy",
    "LengthLimit",
    "LengthPenalty",
    "MeanLogProb",
    "Sampling",
    "Search",
    "SequenceModel",
    "Session",
    "SpecialTokens",
    "complete",
    "generate",
    "load_on_demand",
    "open_on_demand",
]
