"""A small part of a product of test cases that still meets every value, or every pair of values.

Most faults need one value or two that meet, such as one blueprint in bfloat16. So ``./check`` runs
a cover, and ``./check --all`` runs the rest, which carries the marker ``full``:

    cover_and_rest(rows)               the parameters of one ``parametrize``
    @pytest.mark.cover(values=1)       all parameters of a test together, fixtures too: each value
                                       once; 2: each pair of values once
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

Row = tuple[Hashable, ...]
Meeting = tuple[tuple[int, Hashable], ...]


def meetings_of(row: Row, values: int = 2) -> set[Meeting]:
    """The groups of ``values`` values that meet in a row, each value with its column."""
    return set(combinations(enumerate(row), values))


def cover(rows: Sequence[Row], values: int = 2) -> list[Row]:
    """Rows that together meet each group of the given rows; in the given order, always the same.

    Greedy: first the rows in which every group is new, then those with one new group less, and so
    on. Only given rows are chosen, so a product may leave out what does not go together.
    """
    met: set[Meeting] = set()
    chosen: set[int] = set()
    for wanted in range(max((len(meetings_of(row, values)) for row in rows), default=0), 0, -1):
        for place, row in enumerate(rows):
            new = meetings_of(row, values) - met
            if len(new) >= wanted:
                chosen.add(place)
                met |= new
    return [row for place, row in enumerate(rows) if place in chosen]


def cover_and_rest(rows: Sequence[Row]) -> list[Any]:
    """All rows as parameters of a test; those outside the pairwise cover carry ``full``."""
    chosen = set(cover(rows))
    return [pytest.param(*row, marks=() if row in chosen else pytest.mark.full) for row in rows]


def mark_the_rest(items: Iterable[pytest.Item]) -> None:
    """Of each test with the marker ``cover``, marks what is outside the cover with ``full``."""
    products: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("cover"):
            products[item.nodeid.partition("[")[0]].append(item)
    for cases in products.values():
        marker = cases[0].get_closest_marker("cover")
        assert marker is not None
        rows = [tuple(map(_named, sorted(case.callspec.params.items()))) for case in cases]
        chosen = set(cover(rows, **marker.kwargs))
        for case, row in zip(cases, rows, strict=True):
            if row not in chosen:
                case.add_marker(pytest.mark.full)


def _named(parameter: tuple[str, object]) -> Hashable:
    """A value of a parameter; one object is one value where it cannot be hashed."""
    _, value = parameter
    return value if isinstance(value, Hashable) else id(value)
