"""Teachers: callables that return, for a batch, an output from which a loss reads logits."""
