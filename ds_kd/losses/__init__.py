"""Losses in pure torch, without engine or config."""
