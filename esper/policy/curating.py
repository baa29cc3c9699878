"""Which policy decides: the champion, until the log shows that the challenger would do better.

Each closed decision has a reward, and the chance that each policy would have given it. From these
the mean reward of a policy that did not decide is estimated: self-normalised importance sampling
(Swaminathan and Joachims 2015), with its effective sample size (Kish 1965).

    promoted   effective cases of the challenger >= FEWEST_CASES, and the 95 % interval of the
               difference to the champion is above zero
    demoted    by itself: nothing is stored, the newest cases are estimated anew each time

A deterministic champion gives other choices no chance, so only decisions on which both agree tell
anything. The effective sample size says how few these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

FEWEST_CASES = 30.0  # effective ones
NEWEST = 300  # closed decisions that count
MOST_WEIGHT = 20.0  # of one decision: a chance that was very small must not decide alone


@dataclass(frozen=True, slots=True)
class Outcome:
    """A closed decision.

    Attributes:
        decided_by: name of the policy that made it.
        chances: by policy, the probability with which it would have made this decision.
        reward: of the adaptation.
    """

    decided_by: str
    chances: Mapping[str, float]
    reward: float


@dataclass(frozen=True, slots=True)
class Standing:
    """Which policy decides now, and why.

    Attributes:
        champion: name of the policy that decides.
        gain, low, high: mean reward of the challenger less that of the incumbent, with its 95 %
            interval; NaN: no estimate.
        cases: effective sample size of the challenger.
    """

    champion: str
    gain: float
    low: float
    high: float
    cases: float
    reason: str


def standing(outcomes: Sequence[Outcome], *, incumbent: str, challenger: str) -> Standing:
    """The champion by the newest closed decisions.

    Args:
        outcomes: oldest first.
        incumbent: decides unless the challenger is shown to be better.
    """
    known = [
        one
        for one in outcomes[-NEWEST:]
        if math.isfinite(one.reward)
        and one.chances.get(one.decided_by, 0.0) > 0.0
        and {incumbent, challenger} <= one.chances.keys()
    ]
    if not known:
        return _stays(
            incumbent, "No closed decision has stored the probabilities of both policies yet.", 0.0
        )
    rewards = np.array([one.reward for one in known])
    wanted, base = _weights(known, challenger), _weights(known, incumbent)
    cases = _effective(wanted)
    if cases < FEWEST_CASES or _effective(base) < FEWEST_CASES:
        least = min(cases, _effective(base))
        return _stays(
            incumbent,
            f"{least:.0f} of {FEWEST_CASES:.0f} effective cases tell of both policies.",
            cases,
        )
    gain, error = _difference(rewards, wanted, base)
    low, high = gain - 1.96 * error, gain + 1.96 * error
    better = low > 0.0
    reason = (
        f"{challenger} against {incumbent}: {gain:+.4f} of reward (95%: {low:+.4f} to "
        f"{high:+.4f}), {cases:.0f} effective cases; "
        + ("shown to be better." if better else "not shown to be better.")
    )
    return Standing(challenger if better else incumbent, gain, low, high, cases, reason)


def _stays(incumbent: str, reason: str, cases: float) -> Standing:
    return Standing(incumbent, math.nan, math.nan, math.nan, cases, reason)


def _weights(outcomes: Sequence[Outcome], policy: str) -> Doubles:
    """float64 [N]: how much more often the policy would have decided so."""
    ratios = [one.chances[policy] / one.chances[one.decided_by] for one in outcomes]
    return np.minimum(np.array(ratios, dtype=np.float64), MOST_WEIGHT)


def _effective(weights: Doubles) -> float:
    squares = float((weights**2).sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0


def _difference(rewards: Doubles, wanted: Doubles, base: Doubles) -> tuple[float, float]:
    """Of two self-normalised means on the same cases, with the error of their difference."""
    one, other = wanted / wanted.sum(), base / base.sum()
    means = float(one @ rewards), float(other @ rewards)
    parts = one * (rewards - means[0]) - other * (rewards - means[1])
    return means[0] - means[1], math.sqrt(float((parts**2).sum()))
