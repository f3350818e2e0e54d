"""Measurements of gere; each module is a command, `python -m benchmarks.NAME --help`."""
