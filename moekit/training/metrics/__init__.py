"""torchmetrics metrics of a run; every state is a sum, so that they are right over any number of processes."""

from moekit.tasks.translation import TranslationScore
from moekit.training.metrics.labels import LabelCounts
from moekit.training.metrics.perplexity import TokenPerplexity
from moekit.training.metrics.pieces import PieceCounts
from moekit.training.metrics.routing import RoutingStatistics

__all__ = ["LabelCounts", "PieceCounts", "RoutingStatistics", "TokenPerplexity", "TranslationScore"]
