"""An interval of a mean that holds at every look, and not only at one that was fixed before.

A test that is repeated until it succeeds always succeeds in the end. A confidence sequence is an
interval for each number of observations; with probability ``1 - alpha`` all of them together hold.

Shape legend: T observations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Steps = NDArray[np.int64]

ALPHA = 0.05
FEWEST = 4  # observations; below, the scatter is unknown
# Prior variance of (mean / scatter), as 1 / PRIOR_PRECISION. Wide, because the paired differences
# of a graft that acts are many times their scatter: the batches are the same.
PRIOR_PRECISION = 0.01


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval; NaN: unknown, infinite: too few observations."""

    mean: float = math.nan
    low: float = -math.inf
    high: float = math.inf

    @property
    def known(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through observations, which says where they go.

    Attributes:
        now: at the last observation.
        slope: per step.
    """

    interval: Interval
    now: float = math.nan
    slope: float = 0.0

    def after(self, steps: float) -> float:
        """The line's value so many steps after the last observation."""
        return self.now + self.slope * steps


def trend_at_every_look(steps_T: Steps, values_T: Doubles, *, alpha: float = ALPHA) -> Trend:
    """The mean of the observations so far, with an interval that holds at all looks together.

    The observations may move along a straight line, as the gain of a graft does that still learns;
    the interval is of their mean, and their scatter is that around the line. It inverts the t-test
    e-process with a normal prior on the effect size (Lai 1976; Wang and Ramdas 2024, "Anytime-valid
    t-tests and confidence sequences for Gaussian means with unknown variance", section 4, arXiv
    2310.03722): with c² the precision of the prior,

        E_n = sqrt(c² / (n + c²)) ((1 + y) / (1 + y c² / (n + c²)))^(n / 2),    y = t² / (n - 1)

    is at most 1 / alpha at all n together with probability ``1 - alpha`` (Ville 1939). Successive
    observations of one run resemble each other, so n is the effective number of independent ones,
    n (1 - r) / (1 + r) for a lag-1 correlation r (Bayley and Hammersley 1946). That r is corrected
    for its bias in short series (Kendall 1954), and raised by half its own standard error, because
    an r that is too small makes the interval too narrow. The line takes one more observation. With
    both the guarantee is approximate; tests/esper/reward simulates it.

    Args:
        steps_T, values_T: in the order in which they were observed; all finite.
        alpha: chance that the interval fails at any look.
    """
    count = len(values_T)
    if count == 0:
        return Trend(Interval())
    mean = float(values_T.mean())
    if count < FEWEST:
        return Trend(Interval(mean), now=float(values_T[-1]))
    x_T = steps_T.astype(np.float64) - float(steps_T.mean())
    spread = float(x_T @ x_T)
    slope = float(x_T @ values_T) / spread if spread > 0 else 0.0
    residual_T = values_T - mean - slope * x_T
    scatter = math.sqrt(float(residual_T @ residual_T) / (count - 2))
    # A curve that bends smoothly leaves residuals that are all correlated, but small.
    independent = max(FEWEST - 1.0, effective_count(residual_T) - 1.0)
    half = scatter * half_width(independent, alpha=alpha)
    interval = Interval(mean, mean - half, mean + half)
    return Trend(interval, now=mean + slope * float(x_T[-1]), slope=slope)


def half_width(count: float, *, alpha: float = ALPHA) -> float:
    """Half the interval's width, in standard deviations; infinite for too few observations."""
    freedom = count - 1.0
    if freedom <= 0:
        return math.inf
    share = PRIOR_PRECISION / (count + PRIOR_PRECISION)
    grown = (math.sqrt(1.0 / share) / alpha) ** (2.0 / count)
    if grown * share >= 1.0:
        return math.inf
    y = (grown - 1.0) / (1.0 - grown * share)
    return math.sqrt(y * freedom / count)


def effective_count(residual_T: Doubles) -> float:
    """How many independent observations tell as much about the mean."""
    count = len(residual_T)
    power = float(residual_T @ residual_T)
    if power == 0.0:
        return float(count)
    r = float(residual_T[1:] @ residual_T[:-1]) / power
    r = min(0.9, max(0.0, r + (1.0 + 3.0 * r) / count + 0.5 / math.sqrt(count)))
    return count * (1.0 - r) / (1.0 + r)
