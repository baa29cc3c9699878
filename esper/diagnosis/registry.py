"""Finds the rules: ``esper/diagnosis/rules/<slug>.py``, one rule in each file."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import ModuleType

from esper.catalog_files import entry_of, modules_of
from esper.diagnosis import rules
from esper.diagnosis.base import Rule
from esper.exceptions import ConfigurationError


def list_rules() -> tuple[Rule, ...]:
    """Every rule, sorted by slug."""
    return tuple(_by_slug().values())


def title_of(slug: str) -> str:
    """What is wrong by a rule, in quotes: “The loss oscillates”; its slug where it is not known."""
    rule = _by_slug().get(slug)
    return slug if rule is None else f"“{rule.title}”"


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
    found = {rule.slug: rule for rule in (entry_of(module, Rule) for module in modules)}
    for rule in found.values():
        for other in sorted(rule.explained_by - found.keys()):
            raise ConfigurationError(f"rule {rule.slug} names an unknown rule: {other}")
    return dict(sorted(found.items()))


@cache
def _by_slug() -> dict[str, Rule]:
    return discover(modules_of(rules))
