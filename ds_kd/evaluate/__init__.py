"""What a run achieved: models compared on held-out rows."""
