"""Losses of a chunk in one kernel of a GPU."""
