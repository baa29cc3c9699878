"""Companions: the optimizers of grafts, which do what the script does with its own."""
