"""torchmetrics metrics of a run; every state is a sum, so that they are right over any number of processes."""

from moekit.training.metrics.perplexity import TokenPerplexity
from moekit.training.metrics.routing import RoutingStatistics
from moekit.training.metrics.translation import TranslationScore

__all__ = ["RoutingStatistics", "TokenPerplexity", "TranslationScore"]
