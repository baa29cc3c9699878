"""Rescue-400: runs with a fault, what is found in them, and which of them recover."""
