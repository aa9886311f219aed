"""Build a Trainer from a RunConfig; the parts below do not read the config."""
