"""Registers the worker's presence with Celery's signals; the compile task is an adaptation's step."""

from apps.kernels import presence

__all__ = ["presence"]
