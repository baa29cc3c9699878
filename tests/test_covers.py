"""The cover that ./check runs in place of whole products meets each of their pairs."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.covers import Row, cover, cover_and_rest, meetings_of
from tests.esper.grafting.test_graft_contract import (
    BESIDE_THE_RUN,
    CONTRACT,
    PAIRS,
)


def pairs_in(rows: list[Row]) -> set[object]:
    return set().union(*map(meetings_of, rows))


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2)), max_size=40, unique=True
    )
)
def test_a_cover_meets_each_pair_of_any_rows(rows: list[Row]) -> None:
    chosen = cover(rows)
    assert pairs_in(chosen) == pairs_in(rows)
    assert set(chosen) <= set(rows)
    assert cover(rows) == chosen, "the same each time"


def test_a_cover_of_a_product_is_small() -> None:
    rows = list(product(range(5), range(5), range(5)))
    assert 25 <= len(cover(rows)) <= 45


def test_rows_outside_the_cover_are_marked_and_none_is_lost() -> None:
    rows = list(product("abc", "de", "fg"))
    parameters = cover_and_rest(rows)
    assert [parameter.values for parameter in parameters] == rows
    unmarked = [parameter.values for parameter in parameters if not parameter.marks]
    assert unmarked == cover(rows)
    assert {mark.name for parameter in parameters for mark in parameter.marks} == {"full"}


@pytest.mark.parametrize("rows", [CONTRACT, BESIDE_THE_RUN], ids=["contract", "beside the run"])
def test_the_covers_of_the_conformance_suite_meet_each_pair(rows: list[Row]) -> None:
    chosen = cover(rows)
    assert pairs_in(chosen) == pairs_in(rows)
    assert {row[:2] for row in chosen} == set(PAIRS), "each supported pair is tried"
    assert len(chosen) < len(rows)


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("second", range(3))
def test_of_a_marked_product_each_value_is_met(
    request: pytest.FixtureRequest, first: int, second: int
) -> None:
    runs_always = request.node.get_closest_marker("full") is None
    assert runs_always == (first == second)
