"""Texts that a model writes for other code to use: sampling, and a plain copy to write with."""
