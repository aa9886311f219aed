"""Rows: the files that hold them, how they are loaded, and which data set reads them."""
