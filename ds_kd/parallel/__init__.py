"""Ranks, their rendezvous and signals, and the two DeepSpeed engines."""
