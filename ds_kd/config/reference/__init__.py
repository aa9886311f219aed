"""Every key and argument in words: for terminals, docs and editors."""
