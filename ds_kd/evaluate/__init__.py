"""Compare the models of a run on held-out rows."""
