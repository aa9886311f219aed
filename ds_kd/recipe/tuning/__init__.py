"""Choices that follow from the machines of a run, its models and its memory."""
