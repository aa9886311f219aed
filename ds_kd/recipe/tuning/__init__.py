"""What ranks exchange in a step, chosen from the machines, the models and the memory at hand."""
