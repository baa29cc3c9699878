"""Suggests one variant of a blueprint to be tried, from what its sizes have gained so far.

    case       a closed graft, or a trial in shadow: its size against the usual one, and its gain
    model      advantage over the usual size = Σ a·log2(factor) + b·log2(factor)²   (each setting)
    suggest    Thompson sampling over the variants that were never suggested; the usual size is an
               arm with advantage 0, and where it is drawn nothing is suggested

A suggestion is used nowhere: it is tried in shadow, and a curator admits it or does not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.contracts.variants import Factors, key_of, variants_of
from esper.policy.bandit import NOTHING, LinearBandit

Doubles = NDArray[np.float64]

NAME = "variants-1"
NOISE = 0.1  # standard deviation of a gain between runs, a share of the loss
SPREAD = 0.05  # of the advantage that a factor of two may have
NEAREST = 0.1  # octaves: a size that is so near is the usual one


@dataclass(frozen=True, slots=True)
class SizeCase:
    """What one size of a blueprint gained.

    Attributes:
        uid: of the adaptation, or of the trial in shadow.
        decision: cases with the same one were tried on the same run at the same moment.
        factors: of the usual size, by setting; 1.0 where it is missing.
        gain: a share of the held-out loss.
    """

    uid: str
    decision: str
    factors: Mapping[str, float]
    gain: float


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A variant that should be tried.

    Attributes:
        chance: with which it was drawn.
        expected, error: its advantage over the usual size, with the standard error.
        cases: uids of those it was learned from.
    """

    factors: dict[str, float]
    chance: float
    expected: float
    error: float
    cases: tuple[str, ...]


def suggest(
    cases: Sequence[SizeCase],
    tunes: Sequence[str],
    taken: Collection[str],
    rng: np.random.Generator,
) -> Suggestion | None:
    """One variant to be tried, or None: the usual size is as good, or all were suggested.

    Args:
        tunes: settings of the blueprint that may vary.
        taken: :func:`key_of` each variant that was suggested before, whatever became of it.
    """
    arms = [factors for factors in variants_of(tunes) if key_of(factors) not in taken]
    if not arms:
        return None
    model, used = _learned(cases, tunes)
    contexts = np.array([_context(factors, tunes) for factors in arms])
    choice = model.choose(contexts, rng)
    if choice.arm == NOTHING:
        return None
    covariance = np.linalg.inv(model.precision)
    context = contexts[choice.arm]
    return Suggestion(
        factors=arms[choice.arm],
        chance=choice.propensity,
        expected=float(choice.scores[choice.arm]),
        error=math.sqrt(float(context @ covariance @ context)),
        cases=used,
    )


def _learned(
    cases: Sequence[SizeCase], tunes: Sequence[str]
) -> tuple[LinearBandit, tuple[str, ...]]:
    """The posterior, and the cases that tell of the usual size or of another one."""
    known = [case for case in cases if math.isfinite(case.gain) and _sizes_known(case)]
    usual = {case.decision: case.gain for case in known if _is_usual(case, tunes)}
    mean = float(np.mean(list(usual.values()))) if usual else math.nan
    model, used = LinearBandit.new(2 * len(tunes), noise=NOISE, spread=SPREAD), []
    for case in known:
        # On the same run at the same moment where it was tried there, else against all runs.
        base = usual.get(case.decision, mean)
        if math.isfinite(base):
            used.append(case.uid)
        if math.isfinite(base) and not _is_usual(case, tunes):
            advantage = min(1.0, max(-1.0, case.gain - base))
            model = model.learned(_context(case.factors, tunes), advantage)
    return model, tuple(used)


def _sizes_known(case: SizeCase) -> bool:
    return all(factor > 0.0 and math.isfinite(factor) for factor in case.factors.values())


def _is_usual(case: SizeCase, tunes: Sequence[str]) -> bool:
    return all(abs(math.log2(case.factors.get(name, 1.0))) < NEAREST for name in tunes)


def _context(factors: Factors, tunes: Sequence[str]) -> Doubles:
    octaves = [math.log2(factors.get(name, 1.0)) for name in tunes]
    return np.array([value for octave in octaves for value in (octave, octave**2)])
