"""The choice of several options under a budget, against greedy and against every set."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from esper.planning.solver import Budget, Option, Pair, choose, cost_of, within

BUDGET = Budget(changes=4, parameters=1_000, memory_mib=4.0, latency_ms=2.0)


def instance(seed: int) -> tuple[list[Option], set[Pair], dict[Pair, float]]:
    """Ten options at six places, with conflicts and pairs of both signs."""
    rng = np.random.default_rng(seed)
    options = [
        Option(
            key=f"o{number}",
            place=f"p{number % 6}",
            value=float(rng.uniform(0.1, 1.0)),
            parameters=int(rng.integers(100, 700)),
            memory_mib=float(rng.uniform(0.2, 2.5)),
            latency_ms=float(rng.uniform(0.1, 1.2)),
        )
        for number in range(10)
    ]
    keys = [option.key for option in options]
    two = [tuple(rng.choice(keys, 2, replace=False)) for _ in range(5)]
    conflicts = {(str(one), str(other)) for one, other in two[:2]}
    pairs = {(str(a), str(b)): float(rng.uniform(-0.4, 0.4)) for a, b in two[2:]}
    return options, conflicts, pairs


def allowed(chosen: tuple[Option, ...], conflicts: set[Pair], budget: Budget) -> bool:
    keys = {option.key for option in chosen}
    places = [option.place for option in chosen]
    return (
        within(chosen, budget)
        and len(places) == len(set(places))
        and not any(one in keys and other in keys for one, other in conflicts)
    )


def worth(chosen: tuple[Option, ...], pairs: dict[Pair, float]) -> float:
    keys = {option.key for option in chosen}
    together = sum(v for (a, b), v in pairs.items() if a in keys and b in keys)
    return sum(option.value for option in chosen) + together


def greedy(
    options: list[Option], conflicts: set[Pair], pairs: dict[Pair, float], budget: Budget
) -> float:
    """The best next option that still fits, until none adds anything."""
    chosen: tuple[Option, ...] = ()
    while True:
        rest = [o for o in options if o not in chosen and allowed((*chosen, o), conflicts, budget)]
        best = max(rest, key=lambda o: worth((*chosen, o), pairs), default=None)
        if best is None or worth((*chosen, best), pairs) <= worth(chosen, pairs):
            return worth(chosen, pairs)
        chosen = (*chosen, best)


def test_it_is_the_best_of_all_sets_and_better_than_greedy() -> None:
    better = 0
    for seed in range(12):
        options, conflicts, pairs = instance(seed)
        found = choose(options, BUDGET, conflicts=conflicts, pairs=pairs)
        chosen = tuple(option for option in options if option.key in found.chosen)
        assert allowed(chosen, conflicts, BUDGET)
        assert found.value == pytest.approx(worth(chosen, pairs))
        sets = itertools.chain.from_iterable(
            itertools.combinations(options, size) for size in range(BUDGET.changes + 1)
        )
        best = max(worth(one, pairs) for one in sets if allowed(one, conflicts, BUDGET))
        assert found.best
        assert found.value == pytest.approx(best)
        by_greedy = greedy(options, conflicts, pairs, BUDGET)
        assert found.value >= by_greedy - 1e-9
        better += found.value > by_greedy + 1e-6
    assert better >= 3


def test_the_order_of_the_options_does_not_matter() -> None:
    options, conflicts, pairs = instance(5)
    one = choose(options, BUDGET, conflicts=conflicts, pairs=pairs)
    other = choose(options[::-1], BUDGET, conflicts=conflicts, pairs=pairs)
    assert one == other


@pytest.mark.parametrize("limit", [10**9, 10**9 + 1])
def test_a_limit_holds_to_the_last_parameter(limit: int) -> None:
    """One parameter too much is a relative excess of 1e-9, which the solver itself allows."""
    options = [
        Option("a", "a", 1.0, parameters=5 * 10**8),
        Option("b", "b", 1.0, parameters=5 * 10**8 + 1),
        Option("c", "c", 0.1, parameters=1),
    ]
    found = choose(options, Budget(changes=3, parameters=limit))
    chosen = [option for option in options if option.key in found.chosen]
    assert cost_of(chosen)["parameters"] <= limit
    assert found.chosen == (("a", "b") if limit > 10**9 else ("a", "c"))


def test_a_limit_in_binary_fractions_holds_exactly() -> None:
    options = [Option(f"o{number}", f"p{number}", 1.0, memory_mib=0.1) for number in range(10)]
    found = choose(options, Budget(changes=10, memory_mib=0.3))
    spent = cost_of(option for option in options if option.key in found.chosen)
    assert spent["memory_mib"] <= Fraction(0.3)
    assert len(found.chosen) == 2  # three times 0.1 is above 0.3 in binary


def test_an_unknown_cost_fits_no_limit() -> None:
    unknown = Option("a", "a", 9.0, latency_ms=math.nan)
    known = Option("b", "b", 0.1, latency_ms=0.5)
    assert choose([unknown, known], BUDGET).chosen == ("b",)


def test_what_is_worth_nothing_is_not_chosen() -> None:
    assert choose([Option("a", "a", -0.1), Option("b", "b", 0.0)], BUDGET).chosen == ()


def test_a_pair_may_be_worth_more_than_its_members() -> None:
    options = [Option("a", "a", 0.3), Option("b", "b", 0.3), Option("c", "c", 0.5)]
    two = Budget(changes=2)
    assert choose(options, two, pairs={("a", "b"): 0.4}).chosen == ("a", "b")
    assert choose(options, two, pairs={("a", "c"): -0.4, ("b", "c"): -0.4}).chosen == ("a", "b")
