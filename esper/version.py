"""The version of both distributions, written once."""

__version__ = "0.1.0"
