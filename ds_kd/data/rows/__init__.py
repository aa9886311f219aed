"""Rows: find, check and load the files that hold them, and choose the data set that reads them."""
