"""Finds the remedies: one in each file of the catalogue."""

from __future__ import annotations

from functools import cache

from esper.catalog_files import entry_of, modules_of
from esper.exceptions import ConfigurationError
from esper.near_names import did_you_mean
from esper.remedies import catalog
from esper.remedies.base import Remedy


def list_remedies() -> tuple[Remedy, ...]:
    """Every remedy, sorted by slug."""
    return tuple(_by_slug().values())


def get_remedy(slug: str) -> Remedy:
    """Raises ``ConfigurationError`` for a slug that no remedy has."""
    found = _by_slug().get(slug)
    if found is None:
        known = ", ".join(_by_slug())
        raise ConfigurationError(
            f"no remedy {slug!r}{did_you_mean(slug, _by_slug())}; known are: {known}"
        )
    return found


@cache
def _by_slug() -> dict[str, Remedy]:
    remedies = (entry_of(module, Remedy) for module in modules_of(catalog))
    return {remedy.slug: remedy for remedy in remedies}
