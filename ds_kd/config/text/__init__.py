"""The text of a YAML: where values stand in it, where they came from, and which are secret."""
