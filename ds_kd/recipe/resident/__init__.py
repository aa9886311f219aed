"""Teachers that run on the student's ranks: where their weights lie."""
