"""Rows of text → token ids with shifted labels → micro-batches.

The one label shift is `chat.shift`.
"""
