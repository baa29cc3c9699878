"""Variants of blueprints: one or two of their numbers at factors of the usual ones.

    variant   a blueprint with {setting: factor}
    setting   one that the blueprint tunes; "part.setting" where it is a composition
    factor    one of :data:`FACTORS`

The grammar is closed: there are as many variants of a blueprint as :func:`variants_of` lists, and
nothing else may be suggested, tried or admitted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

from esper.contracts.wire import Number, Whole

FACTORS = (0.25, 0.5, 2.0, 4.0)
MOST_SETTINGS = 2  # that one variant changes
Factors = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Variant:
    """An admitted variant, as the server tells it.

    Attributes:
        blueprint: slug.
        factors: by setting.
        gain: of the held-out loss over the usual size, a share: the mean of the trials in shadow
            in which both were tried. NaN: there is none.
        trials: how many these were.
    """

    uid: str
    blueprint: str
    factors: dict[str, float] = field(default_factory=dict)
    gain: Number = math.nan
    trials: Whole = 0


def why_no_variant(factors: Factors, tunes: Collection[str]) -> str:
    """Empty where the grammar has it, otherwise a sentence."""
    if not 1 <= len(factors) <= MOST_SETTINGS:
        return f"A variant changes 1 to {MOST_SETTINGS} settings, not {len(factors)}."
    for setting, factor in factors.items():
        if setting not in tunes:
            known = ", ".join(sorted(tunes)) or "none"
            return f"{setting!r} is no setting that is tuned; these are: {known}."
        if isinstance(factor, bool) or factor not in FACTORS:
            known = ", ".join(f"{one:g}" for one in FACTORS)
            return f"{setting} takes one of the factors {known}, not {factor!r}."
    return ""


def variants_of(tunes: Sequence[str]) -> tuple[dict[str, float], ...]:
    """Every variant of a blueprint, those with fewer settings first."""
    return tuple(
        dict(zip(settings, factors, strict=True))
        for count in range(1, MOST_SETTINGS + 1)
        for settings in combinations(sorted(tunes), count)
        for factors in product(FACTORS, repeat=count)
    )


def key_of(factors: Factors) -> str:
    """``hidden × 2``: the same for equal variants, and for people."""
    return ", ".join(f"{setting} × {factor:g}" for setting, factor in sorted(factors.items()))
