"""The catalogue of module templates. ``all()`` and ``get(slug_or_id)`` read it."""

from esper.blueprints.base import Blueprint, Graft
from esper.blueprints.composition import Composition
from esper.blueprints.registry import all, catalogue, get, register

__all__ = ["Blueprint", "Composition", "Graft", "all", "catalogue", "get", "register"]
