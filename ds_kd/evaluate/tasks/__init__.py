"""The tasks of an evaluation: from a row to tokens, and from a model's output to a record."""
