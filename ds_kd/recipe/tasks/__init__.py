"""Evaluation of models by tasks, from a command and while a run trains."""
