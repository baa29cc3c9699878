"""The catalogue of module templates, read by ``list_blueprints`` and ``get_blueprint``."""

from esper.blueprints.base import Blueprint, Graft
from esper.blueprints.composition import Composition
from esper.blueprints.registry import catalogue, get_blueprint, list_blueprints, register

__all__ = [
    "Blueprint",
    "Composition",
    "Graft",
    "catalogue",
    "get_blueprint",
    "list_blueprints",
    "register",
]
