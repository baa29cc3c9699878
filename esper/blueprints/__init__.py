"""The catalogue of module templates, read by ``list_blueprints`` and ``get_blueprint``."""

from esper.blueprints.base import Blueprint, Graft
from esper.blueprints.composition import Composition
from esper.blueprints.fitting import Fit, Fits, for_layer
from esper.blueprints.registry import catalogue, get_blueprint, list_blueprints, register

# The published names; the longer ones shadow nothing where they are imported by name.
all = list_blueprints
get = get_blueprint

__all__ = [
    "Blueprint",
    "Composition",
    "Fit",
    "Fits",
    "Graft",
    "all",
    "catalogue",
    "for_layer",
    "get",
    "get_blueprint",
    "list_blueprints",
    "register",
]
