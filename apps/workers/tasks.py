"""Celery imports this module in every worker, which connects the signals of ``presence``."""

from apps.workers import presence

__all__ = ["presence"]
