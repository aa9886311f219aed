"""Data sets: rows of text become token ids with shifted labels, and these become micro-batches.

Labels are shifted in one place, `labels.shift`.
"""
