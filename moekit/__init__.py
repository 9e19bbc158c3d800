"""moekit: Mixture-of-Experts training as composable PyTorch Lightning modules."""

__version__ = "0.1.0"
