"""The load benchmarks count exactly: a lost item or frame is never called stored or seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from benchmarks.flood import Sums
from benchmarks.sockets import Browser, missing
from benchmarks.tab_memory import Measured, growth

AGREE = Sums(offered=10, stored=7, dropped=3, waiting=0, unreported=1, rows=7, reported=2)


@pytest.mark.parametrize(
    "changes",
    [{"rows": 6}, {"rows": 8}, {"dropped": 2}, {"waiting": 1}, {"reported": 3}, {"offered": 11}],
)
def test_a_sum_that_differs_is_seen(changes: dict[str, int]) -> None:
    assert AGREE.agree
    assert not replace(AGREE, **changes).agree


@pytest.mark.parametrize(
    ("seen", "lost"), [([4, 5, 6], 0), ([4, 6], 1), ([], 3), ([4, 6, 5], 1), ([4, 4, 5, 6], 1)]
)
def test_a_frame_that_is_missing_or_out_of_order_is_seen(seen: list[int], lost: int) -> None:
    assert missing(Browser(cast(Any, None), begin=3, seen=seen), 6) == lost


def test_a_tab_that_grows_is_called_so_and_one_that_settles_is_not() -> None:
    warm = [Measured(1, 3.0, 12_000, 180), Measured(2, 5.0, 12_000, 180)]
    assert growth([*warm, Measured(3, 6.0, 12_040, 190)]) == []
    assert growth([*warm, Measured(3, 9.0, 12_000, 180)]) == ["heap 5.0 to 9.0 MiB"]
    grown = growth([*warm, Measured(3, 5.0, 24_000, 400)])
    assert grown == ["nodes 12,000 to 24,000", "listeners 180 to 400"]
