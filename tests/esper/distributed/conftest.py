from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.esper.distributed.rank_pool import RankPool

# Not for the session: ranks that wait keep a part of a core busy, which later tests miss.


@pytest.fixture(scope="package")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="package")
def three_ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="package")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()
