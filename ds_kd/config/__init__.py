"""Text to a checked RunConfig; imports no torch."""
