"""The rules; each file holds one, which has its name."""
