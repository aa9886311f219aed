"""Sections of the config for ways to distil, and their checks."""
