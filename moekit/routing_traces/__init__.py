"""Routing that is kept in a file, read again and played again."""

from moekit.routing_traces.reading import RoutingTrace, read_trace
from moekit.routing_traces.recording import Recording, record
from moekit.routing_traces.replay import ReplayRouter, replay
from moekit.routing_traces.rollouts import join_rollout
from moekit.routing_traces.trace import TracedBatch, TracedLayer, TracedTokens
from moekit.routing_traces.writing import TraceWriter

__all__ = [
    "Recording",
    "ReplayRouter",
    "RoutingTrace",
    "TraceWriter",
    "TracedBatch",
    "TracedLayer",
    "TracedTokens",
    "join_rollout",
    "read_trace",
    "record",
    "replay",
]
