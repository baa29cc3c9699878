"""Copies of the model that a script keeps and does not name to Esper."""
