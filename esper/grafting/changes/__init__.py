"""Grafts put into a model: applied and certified, or built again from what was saved."""
