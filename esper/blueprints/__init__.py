"""The catalogue of module templates. ``all()`` and ``get(slug_or_id)`` read it."""

from esper.blueprints.base import Blueprint, Graft
from esper.blueprints.registry import all, get

__all__ = ["Blueprint", "Graft", "all", "get"]
