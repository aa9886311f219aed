"""The losses, pure torch: no engine, no config."""
