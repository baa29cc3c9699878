"""Finds the rules: ``esper/diagnosis/rules/<slug>.py``, one rule in each file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from types import ModuleType

from esper.diagnosis import rules
from esper.diagnosis.base import Rule
from esper.exceptions import ConfigurationError


def list_rules() -> tuple[Rule, ...]:
    """Every rule, sorted by slug."""
    return tuple(_by_slug().values())


def get_rule(slug: str) -> Rule:
    """One rule.

    Raises:
        ConfigurationError: no rule has this slug.
    """
    found = _by_slug().get(slug)
    if found is None:
        raise ConfigurationError(f"no rule {slug!r}; known are: {', '.join(_by_slug())}")
    return found


def discover(modules: Iterable[ModuleType]) -> dict[str, Rule]:
    """slug -> rule, sorted.

    Raises:
        ConfigurationError: a file does not define exactly one rule, which has its name, or a rule
            names another one that does not exist.
    """
    found = {rule.slug: rule for rule in map(_rule_of, modules)}
    for rule in found.values():
        for other in sorted(rule.explained_by - found.keys()):
            raise ConfigurationError(f"rule {rule.slug} names an unknown rule: {other}")
    return dict(sorted(found.items()))


@cache
def _by_slug() -> dict[str, Rule]:
    names = sorted(entry.name for entry in pkgutil.iter_modules(rules.__path__))
    return discover(importlib.import_module(f"{rules.__name__}.{name}") for name in names)


def _rule_of(module: ModuleType) -> Rule:
    file_name = module.__name__.rpartition(".")[2]
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Rule)
        and value.__module__ == module.__name__
    ]
    slugs = sorted(cls.slug for cls in classes)
    if slugs != [file_name]:
        raise ConfigurationError(
            f"rule file {file_name} must hold the one rule {file_name}, has {slugs}"
        )
    return classes[0]()
