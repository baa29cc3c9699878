"""Whether confidence means what it says: predicted probabilities against what came true.

Shape legend: N closed cases, B bins of confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_CASES = 20  # below, the numbers are too few to trust
BINS = 5
RECENT_CASES = 100  # the newest ones, which tell of drift
DRIFT = 2.0
SHRINKAGE = 8.0  # cases that a group's own mean counts for against that of the group above


@dataclass(frozen=True, slots=True)
class Bin:
    """Cases of similar confidence: the mean of what was said, and the share that came true."""

    low: float
    high: float
    cases: int
    said: float
    came_true: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How confidence compares with outcomes; NaN where there is no case.

    Attributes:
        brier: mean squared error of the confidence (Brier 1950); lower is better.
        base: that of always saying the mean outcome, in hindsight; a useful confidence is below.
        ece: expected calibration error, the mean distance of the bins weighted by their cases
            (Naeini et al. 2015).
    """

    cases: int
    brier: float
    base: float
    ece: float
    bins: tuple[Bin, ...]

    @property
    def trusted(self) -> bool:
        """There are enough cases."""
        return self.cases >= FEWEST_CASES

    def __str__(self) -> str:
        if not self.trusted:
            return f"too few to trust: {self.cases} closed cases, {FEWEST_CASES} are needed"
        return (
            f"{self.cases} closed cases, Brier score {self.brier:.3f} (base rate {self.base:.3f}), "
            f"calibration error {self.ece:.3f}"
        )


def calibration(said_N: Sequence[float], came_true_N: Sequence[bool]) -> Calibration:
    """Compares confidences with outcomes; cases of unknown confidence are left out."""
    said, true = np.asarray(said_N, dtype=np.float64), np.asarray(came_true_N, dtype=np.float64)
    known = np.isfinite(said)
    said, true = said[known], true[known]
    if not said.size:
        return Calibration(0, math.nan, math.nan, math.nan, ())
    place = np.minimum((said * BINS).astype(int), BINS - 1)
    bins = tuple(
        Bin(
            low=place_of / BINS,
            high=(place_of + 1) / BINS,
            cases=int((place == place_of).sum()),
            said=float(said[place == place_of].mean()),
            came_true=float(true[place == place_of].mean()),
        )
        for place_of in sorted(set(place.tolist()))
    )
    return Calibration(
        cases=int(said.size),
        brier=float(((said - true) ** 2).mean()),
        base=float(((true.mean() - true) ** 2).mean()),
        ece=sum(b.cases * abs(b.said - b.came_true) for b in bins) / said.size,
        bins=bins,
    )


def overconfidence(said_N: Sequence[float], came_true_N: Sequence[bool]) -> float:
    """By how much the newest confidences were too high on the average; 0 where that may be chance.

    Cases are oldest first. The excess counts where it is beyond ``DRIFT`` standard errors of the
    number of successes that the confidences foretell, with at least ``FEWEST_CASES`` cases.
    """
    said = np.asarray(said_N, dtype=np.float64)[-RECENT_CASES:]
    true = np.asarray(came_true_N, dtype=np.float64)[-RECENT_CASES:]
    if said.size < FEWEST_CASES:
        return 0.0
    excess = float((said - true).mean())
    error = math.sqrt(float((said * (1.0 - said)).sum())) / said.size
    return excess if excess > DRIFT * error else 0.0


def shrunken_rate(groups: Sequence[tuple[int, int]]) -> float:
    """The probability of a success, from nested groups of cases.

    Each group's rate is drawn to that of the group above it as by ``SHRINKAGE`` cases: the mean of
    a hierarchical beta posterior (Gelman et al. 2013, Bayesian Data Analysis, section 5.3) with a
    fixed concentration.

    Args:
        groups: (successes, cases), the widest group first.
    """
    rate = 0.5
    for successes, cases in groups:
        rate = (SHRINKAGE * rate + successes) / (SHRINKAGE + cases)
    return rate
