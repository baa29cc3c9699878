"""Connects the worker's heartbeat; building a kernel is a step of ``apps.adaptations``."""

from apps.kernels import presence

__all__ = ["presence"]
