"""The optimizer step, the training loop and the metrics."""
