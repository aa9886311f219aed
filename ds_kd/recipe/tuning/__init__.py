"""Exchanges of ranks, kernels and compilation, as machines, models and memory allow."""
