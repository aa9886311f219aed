"""A teacher that was run before: its cache is written and opened, and its answers become data."""
