"""The contextual bandit as a policy. It is the challenger: see :mod:`esper.policy.curating`.

    arms       every change that would answer missing capacity, as for a plan
    context    kind of adaptation, whether it spans layers, how much its place matters
    reward     of closed cases: the shipped table's gains, and the installation's experience
    propose    arms in the order of draws without replacement; drawing "nothing" ends the list

It proposes nothing where the heuristic proposes nothing: without the finding that a run lacks
capacity there is no arm. Without experience (``--no-learning``) only the shipped table counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from esper.contracts import AdaptationType, Experience, RunSnapshot
from esper.health import Features
from esper.policy.bandit import NOTHING, LinearBandit
from esper.policy.base import Proposals
from esper.policy.cases import shipped
from esper.policy.heuristic import CAPACITY, WIDER, HeuristicPolicy, Wish, wishes

Doubles = NDArray[np.float64]

MAX_ARMS = 8
NOISE = 0.1  # standard deviation of a gain, a share of the loss
MOST_CASES = 50  # of one blueprint: experience counts at most so much
_TYPES = tuple(AdaptationType)


class BanditPolicy:
    """Thompson sampling over the changes that the finding allows.

    Args:
        types: adaptation type of each blueprint; None: of those that are installed.
    """

    name = "bandit-1"

    def __init__(self, types: Mapping[str, AdaptationType] | None = None) -> None:
        self._types = types

    def propose(
        self, snapshot: RunSnapshot, features: Features, rng: np.random.Generator
    ) -> Proposals:
        """Decisions in the order in which they were drawn, with the chance of each."""
        usual = HeuristicPolicy().propose(snapshot, features)
        finding = next((f for f in snapshot.findings if f.slug == CAPACITY), None)
        if not len(usual) or finding is None:
            return Proposals(reasons=usual.reasons)
        arms = wishes(snapshot, features, finding, most=MAX_ARMS)
        if not arms:
            return usual
        contexts = np.array([_context(arm) for arm in arms])
        choice = self._posterior(snapshot.experience).choose(contexts, rng)
        order = _drawn(choice.propensities, rng)
        nothing = float(choice.propensities[NOTHING])
        reason = f"The bandit drew to do nothing, to which it gave a chance of {nothing:.0%}."
        return Proposals(
            decisions=tuple(arms[place].decision for place in order),
            reasons=() if order else (reason,),
            arms=tuple(
                (arm.decision, float(share))
                for arm, share in zip(arms, choice.propensities, strict=False)
            ),
            nothing=nothing,
        )

    def _posterior(self, experience: Mapping[str, Experience]) -> LinearBandit:
        types = self._installed()
        found = _prior(tuple(sorted(types.items())))
        for slug, seen in sorted(experience.items()):
            if slug in types and math.isfinite(seen.mean_reward):
                context = _of_case(slug, types[slug])
                count = min(seen.cases, MOST_CASES)
                found = _with(found, context, count, seen.mean_reward)
        return found

    def _installed(self) -> Mapping[str, AdaptationType]:
        if self._types is None:
            from esper.blueprints import list_blueprints  # torch, which the web does not import

            self._types = {b.slug: b.adaptation_type for b in list_blueprints()}
        return self._types


@cache
def _prior(types: tuple[tuple[str, AdaptationType], ...]) -> LinearBandit:
    """From the shipped table; each blueprint counts as at most :data:`MOST_CASES` cases."""
    known = dict(types)
    gains: dict[str, list[float]] = {}
    for case in shipped():
        if case.kind == "graft" and case.choice in known and math.isfinite(case.gain):
            gains.setdefault(case.choice, []).append(min(1.0, max(-1.0, case.gain)))
    found = LinearBandit.new(len(_TYPES) + 3, noise=NOISE, spread=0.1)
    for slug, values in sorted(gains.items()):
        context = _of_case(slug, known[slug])
        found = _with(found, context, min(len(values), MOST_CASES), float(np.mean(values)))
    return found


def _with(bandit: LinearBandit, context: Doubles, count: int, mean: float) -> LinearBandit:
    for _ in range(count):
        bandit = bandit.learned(context, mean)
    return bandit


def _context(arm: Wish) -> Doubles:
    return _numbers(arm.decision.adaptation_type, bool(arm.decision.since), arm.weight)


def _of_case(slug: str, adaptation_type: AdaptationType) -> Doubles:
    """A case does not say how much its place mattered, so it counts as the place that does."""
    return _numbers(adaptation_type, slug == WIDER, 1.0)


def _numbers(adaptation_type: AdaptationType, spans: bool, weight: float) -> Doubles:
    kind = [float(adaptation_type is one) for one in _TYPES]
    return np.array([*kind, float(spans), weight, 1.0])


def _drawn(propensities: Doubles, rng: np.random.Generator) -> list[int]:
    """Arms in the order of draws without replacement, until "nothing" is drawn."""
    left = propensities.copy()
    nothing = len(left) - 1
    order: list[int] = []
    while left[:nothing].sum() > 0.0:
        place = int(rng.choice(len(left), p=left / left.sum()))
        if place == nothing:
            break
        order.append(place)
        left[place] = 0.0
    return order
