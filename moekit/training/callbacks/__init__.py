"""Callbacks: component binding, progress, throughput, limits, interruption and random state."""
