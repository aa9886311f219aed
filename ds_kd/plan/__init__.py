"""Plan a run before it starts: its memory, steps and time, and a YAML to start from."""
