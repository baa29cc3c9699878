"""Reads a catalogue that keeps one entry in each file: blueprints, rules, remedies."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from esper.exceptions import ConfigurationError


def modules_of(package: ModuleType) -> list[ModuleType]:
    """The modules in a package's folder, sorted by name."""
    names = sorted(entry.name for entry in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def entry_of(module: ModuleType, base: type[Any]) -> Any:
    """The one entry that a module defines, an object of its class.

    Args:
        module: a file of the catalogue.
        base: the class of all entries; each has a ``slug``.

    Raises:
        ConfigurationError: the module does not define exactly one class of this base, or the
            class's slug is not the file's name.
    """
    file_name = module.__name__.rpartition(".")[2]
    classes: list[Any] = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
    ]
    slugs = sorted(cls.slug for cls in classes)
    if slugs != [file_name]:
        kind = base.__name__.lower()
        raise ConfigurationError(
            f"catalogue file {file_name} must hold the one {kind} {file_name}, has {slugs}"
        )
    return classes[0]()
