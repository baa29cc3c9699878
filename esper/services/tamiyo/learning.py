"""After a verdict: which variant of its blueprint should be tried, by all that was seen so far."""

from __future__ import annotations

import zlib

import numpy as np

from esper.blueprints import Blueprint
from esper.contracts.protocol import TriedSize, TriedSizes, VariantSuggestion
from esper.contracts.variants import key_of
from esper.exceptions import EsperError
from esper.policy.variants import NAME, SizeCase, suggest


def suggestion_for(blueprint: Blueprint, seen: TriedSizes) -> VariantSuggestion | None:
    """One variant that was never suggested, or None: nothing should be tried now.

    The same cases give the same suggestion, so that two Tamiyos do not suggest two.
    """
    if seen.waiting or not blueprint.tunes:
        return None
    cases = [case for tried in seen.cases if (case := _case(blueprint, tried)) is not None]
    taken = {key_of(factors) for factors in seen.taken}
    rng = np.random.default_rng([zlib.crc32(blueprint.slug.encode()), len(cases), len(taken)])
    found = suggest(cases, blueprint.tunes, taken, rng)
    if found is None:
        return None
    return VariantSuggestion(
        factors=found.factors,
        chance=found.chance,
        expected=found.expected,
        error=found.error,
        cases=found.cases,
        policy=NAME,
    )


def _case(blueprint: Blueprint, tried: TriedSize) -> SizeCase | None:
    """None where the installed blueprint does not have that size at that layer."""
    factors = tried.factors
    if factors is None:
        try:
            factors = blueprint.factors_of(tried.layer, tried.config)
        except (EsperError, KeyError, TypeError, ValueError):
            return None
    return SizeCase(tried.uid, tried.decision, factors, tried.gain)
