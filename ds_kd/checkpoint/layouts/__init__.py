"""Checkpoints whose files depend on how ranks were laid out."""
