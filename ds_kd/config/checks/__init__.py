"""Checks of a config by what they look at: keys, components, combinations, files, ZeRO files."""
