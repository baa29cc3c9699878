"""Figures with the command that prints them; each runs as ``python -m benchmarks.<name>``."""
