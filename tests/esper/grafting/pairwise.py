"""A small part of a product of test cases that still meets every pair of values.

Most faults need one value or two that meet, such as one blueprint in bfloat16. So ``./check`` runs
a cover, in which each pair that the product has is met at least once, and ``./check --all`` runs
the rest, which carries the marker ``full``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import pytest

Row = tuple[Hashable, ...]
Pair = tuple[tuple[int, Hashable], tuple[int, Hashable]]


def pairs_of(row: Row) -> set[Pair]:
    """The pairs of values that meet in a row, each value with its column."""
    return set(combinations(enumerate(row), 2))


def pairwise_cover(rows: Sequence[Row]) -> list[Row]:
    """Rows that together meet each pair of the given rows; in the given order, always the same.

    Greedy: first the rows in which every pair is new, then those with one new pair less, and so on.
    Only given rows are chosen, so a product may leave out what does not go together.
    """
    met: set[Pair] = set()
    chosen: set[int] = set()
    for wanted in range(max((len(pairs_of(row)) for row in rows), default=0), 0, -1):
        for place, row in enumerate(rows):
            new = pairs_of(row) - met
            if len(new) >= wanted:
                chosen.add(place)
                met |= new
    return [row for place, row in enumerate(rows) if place in chosen]


def cover_and_rest(rows: Sequence[Row]) -> list[Any]:
    """All rows as parameters of a test; those outside the cover carry the marker ``full``."""
    cover = set(pairwise_cover(rows))
    return [pytest.param(*row, marks=() if row in cover else pytest.mark.full) for row in rows]
