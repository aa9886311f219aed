"""Save and restore the checkpoints of a run, and export its student."""
