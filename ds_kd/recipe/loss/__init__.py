"""The losses that a config names."""
