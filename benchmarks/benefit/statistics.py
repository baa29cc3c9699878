"""Paired comparisons over seeds, and the words for them.

The thresholds here were set before the reported seeds were run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

RESAMPLED = 10_000
SMALLEST = 0.005  # a gain that matters, a share of the other arm's loss
LEVEL = 0.05
FEWEST = 8  # runs; with fewer nothing can be told
PAYS, NOT, UNKNOWN = "pays", "does not pay", "cannot tell"

Gains = Mapping[str, Sequence[float]]  # by host, one for each seed


@dataclass(frozen=True)
class Comparison:
    """Esper against one arm.

    Attributes:
        gain: mean of 1 - Esper's loss / the other's, with its 95 % interval over runs.
        better: share of the runs with a gain above 0.
        chance: that a gain as far from the smallest one that matters, in the direction that was
            seen, came by chance; two-sided, after :func:`holm` among all comparisons of a track.
        runs: with both arms.
    """

    arm: str
    gain: float
    low: float
    high: float
    better: float
    chance: float
    runs: int

    @property
    def word(self) -> str:
        """pays: shown to gain. does not pay: shown to gain less than matters, or to lose."""
        if self.runs < FEWEST or self.chance > LEVEL:
            return UNKNOWN
        return PAYS if self.gain > SMALLEST else NOT

    @property
    def not_worse(self) -> bool:
        """The interval excludes a loss that matters."""
        return self.runs >= FEWEST and self.low > -SMALLEST


def compare(arm: str, gains: Gains) -> Comparison:
    """Runs are drawn within each host, so it speaks of these hosts only."""
    known = [np.array([gain for gain in found if math.isfinite(gain)]) for found in gains.values()]
    known = [found for found in known if len(found)]
    if sum(map(len, known)) < 2:
        return Comparison(arm, math.nan, math.nan, math.nan, math.nan, 1.0, sum(map(len, known)))
    every = np.concatenate(known)
    dice = np.random.default_rng(0)
    sums = np.zeros(RESAMPLED)
    for found in known:
        sums += found[dice.integers(0, len(found), (RESAMPLED, len(found)))].sum(1)
    low, high = np.percentile(sums / len(every), [2.5, 97.5])
    return Comparison(
        arm, float(every.mean()), float(low), float(high), float((every > 0).mean()),
        _chance(every - SMALLEST), len(every),
    )  # fmt: skip


def _chance(values: np.ndarray) -> float:
    """That random signs give a mean as far from 0; all signs, or many of them."""
    count = len(values)
    if count <= 14:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    else:
        bits = np.random.default_rng(0).integers(0, 2, (RESAMPLED, count))
    means = np.abs(((2 * bits - 1) * values).mean(1))
    return float((means >= abs(values.mean()) - 1e-12).mean())


def holm(found: Sequence[Comparison]) -> list[Comparison]:
    """Chances that hold for all comparisons together (Holm 1979)."""
    order = sorted(range(len(found)), key=lambda place: found[place].chance)
    adjusted, highest = [0.0] * len(found), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(found) - rank) * found[place].chance))
        adjusted[place] = highest
    return [replace(one, chance=adjusted[place]) for place, one in enumerate(found)]


def worst(words: Sequence[str]) -> str:
    """Of several comparisons, the one that speaks most against it."""
    return next((word for word in (NOT, UNKNOWN, PAYS) if word in words), UNKNOWN)
