"""Runs whose teacher is read from a cache, and the command that writes one."""
