"""Reference of every key and argument, for terminals, docs and editors."""
