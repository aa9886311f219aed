"""RunConfig to Trainer: the config stops here."""
