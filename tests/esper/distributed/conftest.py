from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.esper.distributed.rank_pool import RankPool

# For one file: gloo's threads, some for each group that a test made, stay busy while a rank waits.


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()
