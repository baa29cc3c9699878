"""The best set of options under a budget: a mixed-integer program, solved by scipy's HiGHS.

    maximise   sum of value_i x_i  +  sum of pair_ij y_ij
    under      sum of cost_i x_i  <=  budget          one row for each limited cost
               sum of x_i         <=  changes
               sum of x_i, i of one place  <=  1
               x_i + x_j <= 1                         for each conflict
               y_ij = x_i and x_j                     for each pair with a value of its own
               x_i in {0, 1}

A greedy choice takes the best option first, and then has no room for two that are better together.

Shape legend: N options, P pairs, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Pair = tuple[str, str]

# The solver allows a relative violation of 1e-6. A choice that uses it is forbidden and the program
# solved again, for some rounds; then the limits are made smaller by twice that much.
EXACT_ROUNDS = 10
TOLERANCE = 2e-6
MAX_SECONDS = 2.0  # of one program; those of a run take milliseconds
COSTS = ("parameters", "memory_mib", "latency_ms")


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that could be done.

    Attributes:
        key: its name. Options are solved in the order of their keys, so that equal options give
            equal answers.
        place: at most one option of a place is chosen.
        value: what it is worth; one that is not above zero is never chosen for itself.
        parameters, memory_mib, latency_ms: its cost; NaN unknown, which fits no limit.
    """

    key: str
    place: str
    value: float
    parameters: int = 0
    memory_mib: float = 0.0
    latency_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits of the sum; inf: no limit."""

    changes: int
    parameters: float = math.inf
    memory_mib: float = math.inf
    latency_ms: float = math.inf


@dataclass(frozen=True, slots=True)
class Solution:
    """What was chosen.

    Attributes:
        chosen: keys, sorted.
        value: of the whole, with the values of its pairs.
        best: it is shown that no other set is worth more; false where the time was up.
    """

    chosen: tuple[str, ...]
    value: float
    best: bool


def choose(
    options: Iterable[Option],
    budget: Budget,
    *,
    conflicts: Iterable[Pair] = (),
    pairs: Mapping[Pair, float] | None = None,
) -> Solution:
    """The set that is worth most. The order of the options does not matter.

    Args:
        conflicts: keys of options that exclude each other.
        pairs: value that two options have together, beside their own; may be below zero.

    Returns:
        It keeps every limit exactly, by arithmetic without rounding.
    """
    ordered = sorted(
        (option for option in options if _fits_alone(option, budget)), key=lambda o: o.key
    )
    if not ordered or budget.changes < 1:
        return Solution((), 0.0, True)
    pairs = pairs or {}
    program = _Program(ordered, budget, conflicts, pairs)
    for _ in range(EXACT_ROUNDS):
        picked, best = program.solve()
        if within(picked, budget):
            return Solution(tuple(o.key for o in picked), program.value(picked), best)
        program.forbid(picked)
    program = _Program(ordered, _smaller(budget), conflicts, pairs)
    picked, _ = program.solve()
    if not within(picked, budget):
        return Solution((), 0.0, False)
    return Solution(tuple(o.key for o in picked), program.value(picked), False)


def _smaller(budget: Budget) -> Budget:
    limits = {name: getattr(budget, name) * (1.0 - TOLERANCE) for name in COSTS}
    return Budget(changes=budget.changes, **limits)


def cost_of(options: Iterable[Option]) -> dict[str, Fraction]:
    """The sum of each cost, without rounding."""
    chosen = list(options)
    return {name: sum((Fraction(getattr(o, name)) for o in chosen), Fraction(0)) for name in COSTS}


def within(options: Sequence[Option], budget: Budget) -> bool:
    """Every limit holds, without rounding."""
    spent = cost_of(options)
    limits = {name: getattr(budget, name) for name in COSTS}
    return len(options) <= budget.changes and all(
        math.isinf(limit) or spent[name] <= Fraction(limit) for name, limit in limits.items()
    )


def _fits_alone(option: Option, budget: Budget) -> bool:
    if not math.isfinite(option.value):
        return False
    for name in COSTS:
        cost, limit = getattr(option, name), getattr(budget, name)
        if not math.isfinite(cost) or cost > limit:
            return False
    return True


class _Program:
    """The arrays of one program; ``forbid`` adds a row."""

    def __init__(
        self,
        options: Sequence[Option],
        budget: Budget,
        conflicts: Iterable[Pair],
        pairs: Mapping[Pair, float],
    ) -> None:
        self._options = options
        self._at = {option.key: place for place, option in enumerate(options)}
        self._pairs = {
            (self._at[one], self._at[other]): value
            for (one, other), value in sorted(pairs.items())
            if one in self._at and other in self._at and value
        }
        self._rows: list[Doubles] = []
        self._most: list[float] = []
        self._add_limits(budget)
        self._add_exclusions(conflicts)
        self._link_pairs()

    def solve(self) -> tuple[list[Option], bool]:
        """The chosen options, and whether they are shown to be the best."""
        # Not at the top: scipy takes a tenth of a second to import, and few runs plan.
        from scipy.optimize import Bounds, LinearConstraint, milp

        count = len(self._options)
        worth = np.array([o.value for o in self._options] + list(self._pairs.values()))
        answer = milp(
            -worth,
            integrality=np.concatenate([np.ones(count), np.zeros(len(self._pairs))]),
            bounds=Bounds(0.0, 1.0),
            constraints=LinearConstraint(np.array(self._rows), -np.inf, np.array(self._most)),
            options={"time_limit": MAX_SECONDS, "mip_rel_gap": 0.0},
        )
        if answer.x is None:
            return [], False
        picked = [o for o, taken in zip(self._options, answer.x, strict=False) if taken > 0.5]
        return picked, bool(answer.status == 0)

    def value(self, picked: Sequence[Option]) -> float:
        taken = {self._at[option.key] for option in picked}
        together = (v for (i, j), v in self._pairs.items() if i in taken and j in taken)
        return float(sum(option.value for option in picked) + sum(together))

    def forbid(self, picked: Sequence[Option]) -> None:
        """Not all of these at once: by exact arithmetic they are over a limit."""
        row = self._row({self._at[option.key]: 1.0 for option in picked})
        self._add(row, len(picked) - 1.0)

    def _add_limits(self, budget: Budget) -> None:
        self._add(self._row(dict.fromkeys(range(len(self._options)), 1.0)), float(budget.changes))
        for name in COSTS:
            limit = float(getattr(budget, name))
            if math.isinf(limit):
                continue
            scale = limit or 1.0  # a limit of 0 admits what costs nothing
            costs = {p: getattr(o, name) / scale for p, o in enumerate(self._options)}
            self._add(self._row(costs), limit / scale)

    def _add_exclusions(self, conflicts: Iterable[Pair]) -> None:
        places: dict[str, list[int]] = {}
        for place, option in enumerate(self._options):
            places.setdefault(option.place, []).append(place)
        for members in places.values():
            if len(members) > 1:
                self._add(self._row(dict.fromkeys(members, 1.0)), 1.0)
        for one, other in sorted(set(conflicts)):
            if one in self._at and other in self._at and one != other:
                self._add(self._row({self._at[one]: 1.0, self._at[other]: 1.0}), 1.0)

    def _link_pairs(self) -> None:
        count = len(self._options)
        for number, ((one, other), value) in enumerate(self._pairs.items()):
            both = count + number
            if value > 0:  # only where both are chosen
                self._add(self._row({both: 1.0, one: -1.0}), 0.0)
                self._add(self._row({both: 1.0, other: -1.0}), 0.0)
            else:  # whenever both are chosen
                self._add(self._row({one: 1.0, other: 1.0, both: -1.0}), 1.0)

    def _row(self, members: Mapping[int, float]) -> Doubles:
        row_V = np.zeros(len(self._options) + len(self._pairs))
        for place, factor in members.items():
            row_V[place] = factor
        return row_V

    def _add(self, row_V: Doubles, most: float) -> None:
        self._rows.append(row_V)
        self._most.append(most)
