"""Finds the remedies: one in each file of the catalogue."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from esper.exceptions import ConfigurationError
from esper.remedies import catalog
from esper.remedies.base import Remedy


def list_remedies() -> tuple[Remedy, ...]:
    """Every remedy, sorted by slug."""
    return tuple(_by_slug().values())


def get_remedy(slug: str) -> Remedy:
    """Raises ``ConfigurationError`` for a slug that no remedy has."""
    found = _by_slug().get(slug)
    if found is None:
        near = difflib.get_close_matches(slug, _by_slug(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(_by_slug())
        raise ConfigurationError(f"no remedy {slug!r}{hint} Known are: {known}")
    return found


@cache
def _by_slug() -> dict[str, Remedy]:
    names = sorted(entry.name for entry in pkgutil.iter_modules(catalog.__path__))
    return {name: _remedy_of(f"{catalog.__name__}.{name}") for name in names}


def _remedy_of(name: str) -> Remedy:
    module = importlib.import_module(name)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Remedy) and value.__module__ == name
    ]
    slug = name.rpartition(".")[2]
    if [cls.slug for cls in classes] != [slug]:
        raise ConfigurationError(f"the file {slug} of the catalogue must hold one remedy {slug!r}")
    remedy: Remedy = classes[0]()
    return remedy
