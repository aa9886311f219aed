"""A teacher's outputs on disk: rows keyed by the tokens that lead to them."""
