"""Readers of what engines record: one module per format, each with `read(path, hints)`."""
