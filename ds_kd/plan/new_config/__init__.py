"""A YAML to start from, for models, rows and machines."""
