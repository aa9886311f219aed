"""Ranks, their meeting, their signals, and the two DeepSpeed engines."""
