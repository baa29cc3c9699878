"""Finds the catalogue: every module in ``catalog/`` holds one blueprint named like its file.

Nothing may depend on the order in which files are found: :func:`all` sorts by slug.
"""

from __future__ import annotations

import builtins
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from types import ModuleType

from esper.blueprints import catalog
from esper.blueprints.base import Blueprint
from esper.exceptions import DuplicateBlueprintError, UnknownBlueprintError


def all() -> tuple[Blueprint, ...]:
    """Every blueprint of the catalogue, sorted by slug."""
    return tuple(_by_slug().values())


def get(slug_or_id: str) -> Blueprint:
    """One blueprint by slug ("proj_lora_64") or id ("BP-PROJ-LoRA-64").

    Raises:
        UnknownBlueprintError: there is none.
    """
    found = _by_slug().get(slug_or_id) or next(
        (blueprint for blueprint in all() if blueprint.id == slug_or_id), None
    )
    if found is None:
        known = ", ".join(_by_slug())
        raise UnknownBlueprintError(
            f"no blueprint {slug_or_id!r}; known are: {known}", slug=slug_or_id
        )
    return found


def discover(modules: Iterable[ModuleType]) -> dict[str, Blueprint]:
    """slug -> blueprint, sorted.

    Raises:
        DuplicateBlueprintError: a slug is not its file's name, a file holds not exactly one
            blueprint, or two claim one slug or id.
    """
    found: dict[str, Blueprint] = {}
    for module in modules:
        blueprint = _blueprint_of(module)
        if blueprint.slug in found or blueprint.id in {other.id for other in found.values()}:
            raise DuplicateBlueprintError(
                f"{blueprint.slug} ({blueprint.id}) stands twice in the catalogue",
                slug=blueprint.slug,
            )
        found[blueprint.slug] = blueprint
    return dict(sorted(found.items()))


@cache
def _by_slug() -> dict[str, Blueprint]:
    names = sorted(entry.name for entry in pkgutil.iter_modules(catalog.__path__))
    return discover(importlib.import_module(f"{catalog.__name__}.{name}") for name in names)


def _blueprint_of(module: ModuleType) -> Blueprint:
    file_name = module.__name__.rpartition(".")[2]
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Blueprint)
        and value.__module__ == module.__name__
    ]
    slugs = builtins.sorted(cls.slug for cls in classes)
    if slugs != [file_name]:
        raise DuplicateBlueprintError(
            f"catalogue file {file_name} must hold the one blueprint {file_name}, has {slugs}",
            slug=file_name,
        )
    return classes[0]()
