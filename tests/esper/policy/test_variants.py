"""What is suggested to be tried, from what sizes have gained so far."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.variants import FACTORS, key_of, variants_of
from esper.policy.variants import SizeCase, suggest

TUNES = ("hidden", "rank")


def cases(best: float, count: int = 40) -> list[SizeCase]:
    """Sizes of ``hidden`` whose gain is highest at one factor; the runs differ in their level."""
    dice = np.random.default_rng(0)
    found = []
    for number in range(count):
        level = dice.normal(0.2, 0.2)
        for factor in (1.0, float(dice.choice(FACTORS))):
            worth = 0.1 - 0.1 * abs(math.log2(factor / best))
            gain = level + worth + dice.normal(0.0, 0.01)
            found.append(SizeCase(f"{number}-{factor}", f"d{number}", {"hidden": factor}, gain))
    return found


def drawn(known: list[SizeCase], taken: frozenset[str] = frozenset()) -> Counter[str]:
    answers = (suggest(known, TUNES, taken, np.random.default_rng(seed)) for seed in range(200))
    return Counter(key_of(one.factors) if one else "nothing" for one in answers)


def test_what_gained_most_beside_the_usual_size_is_suggested_most() -> None:
    (most, times), *_ = drawn(cases(best=2.0)).most_common()
    assert "hidden × 2" in most
    assert times > 50


def test_where_the_usual_size_is_best_little_is_suggested() -> None:
    worse = [
        SizeCase(f"{place}{number}", f"{place}{number}", factors, gain)
        for number in range(40)
        for place, factors in enumerate(({}, *variants_of(TUNES)))
        for gain in ([0.3] if not factors else [0.3 - 0.2])
    ]
    answers = drawn(worse)
    assert answers["nothing"] > 150, answers


def test_without_a_case_something_may_be_tried() -> None:
    answers = drawn([])
    assert len(answers) > 5
    assert answers["nothing"] < 100


@given(
    gains=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=12),
    factor=st.floats(allow_nan=True, allow_infinity=True),
    left=st.integers(0, 23),
    seed=st.integers(0, 100),
)
def test_only_what_the_grammar_has_and_was_never_suggested(
    gains: list[float], factor: float, left: int, seed: int
) -> None:
    every = [key_of(factors) for factors in variants_of(TUNES)]
    free = set(every[:left])
    known = [
        SizeCase(str(place), "d", {"hidden": factor if place % 2 else 1.0}, gain)
        for place, gain in enumerate(gains)
    ]
    found = suggest(known, TUNES, set(every) - free, np.random.default_rng(seed))
    assert found is None or key_of(found.factors) in free


def test_a_suggestion_names_the_cases_it_was_learned_from() -> None:
    known = [*cases(best=4.0, count=3), SizeCase("lost", "d0", {"hidden": 2.0}, math.nan)]
    found = next(
        one for seed in range(50) if (one := suggest(known, TUNES, (), np.random.default_rng(seed)))
    )
    assert set(found.cases) == {case.uid for case in known} - {"lost"}
    assert 0.0 < found.chance <= 1.0
    assert found.error > 0.0
