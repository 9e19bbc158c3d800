"""Kernels in Triton, each beside its reference, and the choice of who computes a sparse layer."""
